  const data = JSON.parse(one("#data").textContent);
  const which = one("#which");
  const table = layerTable({
    fits: (row) => !which.value ||
      (which.value === "noted" ? "noted" in row.dataset : (which.value === "skipped") === ("skipped" in row.dataset)),
    clear: () => { which.value = ""; },
  });
  which.addEventListener("change", table.update);

  // Findings lead to the weights that they speak of.
  for (const item of all("[data-some]")) {
    const made = document.createElement("button");
    const some = item.dataset.some.split(" ");
    made.type = "button";
    made.className = "js jump";
    made.textContent = some.length > 1 ? "show these " + some.length : "show it";
    made.addEventListener("click", () => {
      if (table.choose({ some })) one("#layers").scrollIntoView();
      if (data.spectra[some[0]]) show(some[0]);
    });
    one("p.claim", item).append(" ", made);
  }

  const sum = (steps) => {
    let total = 0;
    return steps.map((step) => (total += step));
  };
  const decode = ([places, first, sigma, noiseFirst, noise, energy]) => {
    const scaled = (top, steps) => sum(steps).map((n) => (n <= -20000 ? 0 : top * 10 ** (n / 1000)));
    return {
      places: data.places[places],
      sigma: scaled(first, sigma),
      noise: scaled(noiseFirst, noise),
      energy: sum(energy).map((n) => n / 10000),
    };
  };
  const figure = (x) => {
    if (x === null || x === undefined) return "–";
    const size = Math.abs(x);
    return size !== 0 && (size < 1e-4 || size >= 1e6) ? x.toExponential(2) : String(Number(x.toPrecision(4)));
  };
  const unpack = (packed) =>
    packed === null ? null
      : typeof packed === "number" ? { value: packed, uncertainty: 0, atLeast: 0, notes: [] }
        : { value: packed[0], uncertainty: packed[1], atLeast: packed[2], notes: packed[3].map((n) => data.notes[n]) };
  const findingOf = (row, name) => {
    const found = unpack(row[9][data.findings.findIndex((f) => f[0] === name)] ?? null);
    return found ? found.value : null;
  };

  // Drawings: an SVG of 300 × 190 with its axes; `at` maps a value to a share of the scale.
  const W = 300, H = 190, L = 40, R = 8, T = 8, B = 30;
  const node = (name, attributes, parent, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const scale = (low, high, log) => ({
    low, high, log,
    at: (v) => (log ? Math.log(v / low) / Math.log(high / low || 1) : (v - low) / (high - low)) || 0,
    ticks: () => {
      const found = [];
      if (log) {
        const powers = Math.log10(high / low), every = Math.max(1, Math.ceil(powers / 5));
        for (let p = Math.ceil(Math.log10(low) - 1e-9); p <= Math.log10(high) + 1e-9; p += 1)
          for (const m of powers < 2 ? [1, 2, 5] : [1])
            if ((m > 1 || p % every === 0) && m * 10 ** p <= high * 1.001) found.push(m * 10 ** p);
        return found;
      }
      const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
      for (let k = Math.ceil(low / step - 1e-9); k * step <= high * 1.001; k += 1) found.push(k * step);
      return found;
    },
  });
  const px = (x, v) => L + (W - L - R) * x.at(v), py = (y, v) => T + (H - T - B) * (1 - y.at(v));
  const short = (v) => (Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(0).replace("+", "") : String(Number(v.toPrecision(3))));
  const frame = (title, x, y, xName, percent) => {
    const box = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    box.append(caption);
    const svg = node("svg", { viewBox: "0 0 " + W + " " + H, role: "img", "aria-label": title }, box);
    for (const t of y.ticks()) {
      node("path", { class: "grid", d: "M" + L + " " + py(y, t).toFixed(1) + "H" + (W - R) }, svg);
      node("text", { x: L - 5, y: py(y, t) + 3.5, "text-anchor": "end" }, svg, percent ? Math.round(100 * t) + " %" : short(t));
    }
    for (const t of x.ticks())
      node("text", { x: px(x, t), y: H - B + 13, "text-anchor": "middle" }, svg, short(t));
    node("text", { x: (L + W - R) / 2, y: H - 3, "text-anchor": "middle" }, svg, xName);
    return { box, svg };
  };
  const path = (points) => points.map(([a, b], i) => (i ? "L" : "M") + a.toFixed(1) + " " + b.toFixed(1)).join("");

  const spectrumOf = (s) => {
    const low = Math.min(...[...s.sigma, ...s.noise].filter((v) => v > s.sigma[0] * 1e-3));
    const x = scale(1, Math.max(2, s.places.at(-1) + 1), true), y = scale(low, Math.max(s.sigma[0], s.noise[0] || 0), true);
    if (y.low === y.high) y.low = y.high / 10;
    const made = frame("Singular values (solid)" + (s.noise.length ? " and those of noise (dashed)" : "") + ", by index", x, scale(y.low, y.high, true), "index, from 1");
    const clip = (v) => Math.max(v, y.low);
    const draw = (values, name) =>
      node("path", { class: name, d: path(values.map((v, i) => [px(x, s.places[i] + 1), py(scale(y.low, y.high, true), clip(v))])) }, made.svg);
    if (s.noise.length) draw(s.noise, "noise");
    draw(s.sigma, "sigma");
    return { ...made, x, offset: 1 };
  };
  const energyOf = (s, even) => {
    const x = scale(0, s.places.at(-1) + 1, false), y = scale(0, 1, false);
    const made = frame("Energy held at each rank; dashed: break-even rank", x, y, "rank", true);
    if (even !== null && even <= x.high) node("path", { class: "even", d: "M" + px(x, even).toFixed(1) + " " + T + "V" + (H - B) }, made.svg);
    node("path", { class: "sigma", d: path([[px(x, 0), py(y, 0)], ...s.energy.map((e, i) => [px(x, s.places[i] + 1), py(y, e)])]) }, made.svg);
    return { ...made, x, offset: 1 };
  };
  // How many singular values fall into each of n bins, from the kept quantiles: straight lines between them.
  const binned = (s, values, low, high, n) => {
    const bins = new Array(n).fill(0);
    for (let i = 1; i < values.length; i += 1) {
      const many = s.places[i] - s.places[i - 1], a = values[i], b = values[i - 1];
      const first = Math.floor(((a - low) / (high - low)) * n), last = Math.floor(((b - low) / (high - low)) * n);
      for (let k = Math.max(0, first); k <= Math.min(n - 1, last); k += 1) {
        const from = low + ((high - low) * k) / n, to = from + (high - low) / n;
        bins[k] += b > a ? (many * (Math.min(b, to) - Math.max(a, from))) / (b - a) : many;
      }
    }
    return bins;
  };
  const bulkOf = (s) => {
    const top = s.noise.length ? Math.min(s.sigma[0], s.noise[0] * 1.6) : s.sigma[0], n = 36;
    const counts = binned(s, s.sigma, 0, top, n), noise = s.noise.length ? binned(s, s.noise, 0, top, n) : [];
    const x = scale(0, top, false), y = scale(0, Math.max(...counts, ...noise) || 1, false);
    const above = s.places[s.sigma.findIndex((v) => v <= top)] || 0;
    const made = frame("Singular values by size" + (noise.length ? "; dashed: noise" : "") + (above ? "; " + above + " lie further right" : ""), x, y, "σ");
    const wide = (W - L - R) / n;
    counts.forEach((c, k) => c > 0 &&
      node("rect", { class: "hist", x: (L + k * wide).toFixed(1), y: py(y, c).toFixed(1), width: (wide - 0.8).toFixed(1), height: (H - B - py(y, c)).toFixed(1) }, made.svg));
    if (noise.length) {
      const stairs = noise.flatMap((c, k) => [[L + k * wide, py(y, c)], [L + (k + 1) * wide, py(y, c)]]);
      node("path", { class: "noise", d: path(stairs) }, made.svg);
    }
    return made;
  };

  const select = one("#weight");
  const show = (i) => {
    const row = data.rows[i], s = data.spectra[i] && decode(data.spectra[i]);
    select.value = i;
    table.rows.forEach((tr) => tr.classList.toggle("open", tr.dataset.i === String(i)));
    one("#facts").textContent = row[1] + ", " + row[2].join(" × ") + " as stored";
    const drawings = one("#drawings"), reading = one("#reading");
    drawings.replaceChildren();
    reading.textContent = "";
    if (s) {
      const made = [spectrumOf(s)];
      if (s.energy.length) made.push(energyOf(s, findingOf(row, "break_even_rank")));
      made.push(bulkOf(s));
      for (const { box, svg, x, offset } of made) {
        drawings.append(box);
        if (!x) continue;
        const cursor = node("path", { class: "cursor" }, svg);
        svg.addEventListener("pointermove", (event) => {
          const area = svg.getBoundingClientRect(), want = ((event.clientX - area.left) / area.width) * W;
          let best = 0;
          s.places.forEach((p, k) => {
            if (Math.abs(px(x, p + offset) - want) < Math.abs(px(x, s.places[best] + offset) - want)) best = k;
          });
          const at = px(x, s.places[best] + offset).toFixed(1);
          cursor.setAttribute("d", "M" + at + " " + T + "V" + (H - B));
          reading.textContent = "Direction " + (s.places[best] + 1) + ": σ " + figure(s.sigma[best]) +
            (s.noise.length ? ", noise " + figure(s.noise[best]) : "") +
            (s.energy.length ? "; the first " + (s.places[best] + 1) + " hold " + (100 * s.energy[best]).toFixed(1) + " % of the energy" : "");
        });
      }
    }
    const figures = one("#figures");
    figures.replaceChildren();
    data.findings.forEach(([, label, meaning], k) => {
      const found = unpack(row[9][k]);
      if (!found) return;
      const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = label;
      dt.title = meaning;
      dd.textContent = (found.atLeast ? "≥ " : "") + figure(found.value) + (found.uncertainty ? " ± " + figure(found.uncertainty) : "");
      for (const note of found.notes) {
        const small = document.createElement("small");
        small.textContent = note;
        dd.append(small);
      }
      box.append(dt, dd);
      figures.append(box);
    });
  };
  if (select) {
    const drawable = data.rows.map((row, i) => [row, i]).filter(([row]) => !row[6]);
    for (const [row, i] of drawable) {
      const option = document.createElement("option");
      option.value = i;
      option.textContent = row[0];
      select.append(option);
    }
    select.addEventListener("change", () => show(Number(select.value)));
    for (const tr of table.rows)
      if (!("skipped" in tr.dataset))
        button(one("th span:last-of-type", tr), () => {
          show(Number(tr.dataset.i));
          one("#detail").scrollIntoView();
        });
    const first = one("[data-some]");
    const wanted = first ? first.dataset.some.split(" ").find((i) => !data.rows[i][6]) : undefined;
    if (drawable.length) show(wanted === undefined ? drawable[0][1] : Number(wanted));
  }

  // Downloads are made here, of the figures that the page holds.
  const save = (name, kind, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const records = () => data.rows.map((row) => ({
    name: row[0], dtype: row[1], shape: row[2], parameters: row[3], role: row[4], depth: row[5], skipped: row[6],
    findings: Object.fromEntries(data.findings.map(([name], k) => [name, unpack(row[9][k])]).filter(([, found]) => found)),
  }));
  const quoted = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  const csv = () => {
    const names = data.findings.map(([name]) => name);
    const head = ["name", "dtype", "shape", "parameters", "role", "depth", "skipped", ...names.flatMap((n) => [n, n + "_uncertainty"])];
    const lines = records().map((r) => [r.name, r.dtype, r.shape.join("x"), r.parameters, r.role, r.depth, r.skipped,
      ...names.flatMap((n) => (r.findings[n] ? [r.findings[n].value, r.findings[n].uncertainty] : ["", ""]))]);
    return [head, ...lines].map((line) => line.map(quoted).join(",")).join("\n") + "\n";
  };
  for (const made of all("[data-download]"))
    made.addEventListener("click", () => {
      const { title, source, tier, base } = data;
      if (made.dataset.download === "csv") save("weights.csv", "text/csv", csv());
      else save("weights.json", "application/json", JSON.stringify({ title, source, tier, base, weights: records() }, null, 1));
    });

  table.update();
