(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  document.documentElement.classList.add("on");

  const body = one(".layers tbody");
  const rows = all("tr", body);
  const find = one("#find"), form = one("#form"), flagged = one("#flagged"), shown = one("#shown");
  const marks = new Map(rows.map((row) => [row.dataset.i, []]));
  all(".line,.dot").forEach((mark) => marks.get(mark.dataset.i).push(mark));
  const cells = all(".map a,.outside a");
  const none = document.createElement("tr");
  none.className = "none";
  none.innerHTML = '<td colspan="8">No layer fits. “Show all” brings them back.</td>';

  // What was chosen on the map: {group}, {depth, stack} or {i}; null for nothing.
  let chosen = null;

  const nameOf = (row) => {
    const span = one("th span", row);
    return span.title || span.textContent;
  };
  const texts = new Map(rows.map((row) => [row, (nameOf(row) + " " + row.dataset.group).toLowerCase()]));

  const fits = (row) =>
    texts.get(row).includes(find.value.trim().toLowerCase()) &&
    (!form.value || row.dataset.form === form.value) &&
    (!flagged || !flagged.checked || "flag" in row.dataset) &&
    (!chosen ||
      (chosen.i !== undefined ? row.dataset.i === chosen.i
        : chosen.group !== undefined ? row.dataset.group === chosen.group
        : row.dataset.depth === chosen.depth && nameOf(row).startsWith(chosen.stack)));

  const update = () => {
    const visible = new Set();
    for (const row of rows) {
      row.hidden = !fits(row);
      if (!row.hidden) visible.add(row.dataset.i);
      for (const mark of marks.get(row.dataset.i)) mark.classList.toggle("out", row.hidden);
    }
    for (const cell of cells) cell.classList.toggle("faded", !visible.has(cell.dataset.i));
    if (visible.size) none.remove(); else body.append(none);
    shown.textContent = visible.size + " of " + rows.length + " layers";
  };

  const choose = (what) => {
    const again = chosen && JSON.stringify(chosen) === JSON.stringify(what);
    chosen = again ? null : what;
    update();
    return !again;
  };

  const reset = () => {
    chosen = null;
    find.value = form.value = "";
    if (flagged) flagged.checked = false;
    update();
  };

  // Sorting: by data-v, else by the number in the text, else by the words; layers without a figure go last.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.v) return Number(cell.dataset.v);
    if (column === 3 && cell.textContent === "full") return Infinity;
    const text = column === 0 ? nameOf(row) : cell.textContent.replace(/^▲.*error /, "").trim();
    if (column === 0 || cell.classList.contains("words")) return text;
    const number = parseFloat(text);
    return Number.isNaN(number) ? null : number;
  };
  const compare = (a, b) =>
    typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a < b ? -1 : a > b ? 1 : 0;
  const sort = (heading, column) => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    all(".layers thead th").forEach((th) => th.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = rows.map((row, i) => [keyOf(row, column), i, row]);
    keyed.sort(([a, i], [b, j]) =>
      a === null || b === null ? (a === null) - (b === null) || i - j : (down ? compare(b, a) : compare(a, b)) || i - j);
    body.append(...keyed.map(([, , row]) => row));
  };

  const button = (parent, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.append(...parent.childNodes);
    made.addEventListener("click", action);
    parent.append(made);
  };
  all(".layers thead th").forEach((th, column) => button(th, () => sort(th, column)));
  all(".map tbody th").forEach((th) => button(th, () => choose({ group: th.dataset.group })));
  all(".map thead th[data-depth]").forEach((th) =>
    button(th, () => choose({ depth: th.dataset.depth, stack: th.dataset.stack })));

  // The map is one stop of the Tab key; arrows move within it.
  for (const map of all(".map")) {
    const links = all("a", map);
    links.forEach((link, i) => { link.tabIndex = i ? -1 : 0; });
    map.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const link = event.target.closest("td a");
      if (!step || !link) return;
      const cell = link.parentElement;
      const lines = all("tbody tr", map);
      const line = lines[lines.indexOf(cell.parentElement) + step[0]];
      const next = line && line.cells[cell.cellIndex + step[1]];
      const target = next && one("a", next);
      event.preventDefault();
      if (!target) return;
      link.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    });
  }
  for (const cell of cells) {
    cell.addEventListener("click", (event) => {
      event.preventDefault();
      if (choose({ i: cell.dataset.i })) one("#layers").scrollIntoView();
    });
    const light = (on) => () => marks.get(cell.dataset.i).forEach((mark) => mark.classList.toggle("hot", on));
    for (const [name, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]])
      cell.addEventListener(name, light(on));
  }
  for (const row of rows) {
    const light = (on) => () => marks.get(row.dataset.i).forEach((mark) => mark.classList.toggle("hot", on));
    row.addEventListener("mouseenter", light(true));
    row.addEventListener("mouseleave", light(false));
  }

  find.addEventListener("input", update);
  form.addEventListener("change", update);
  if (flagged) flagged.addEventListener("change", update);
  one("#reset").addEventListener("click", reset);

  const copy = async (text) => {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  };
  for (const made of all(".copy"))
    made.addEventListener("click", async () => {
      await copy(one("#" + made.dataset.copy).textContent);
      made.textContent = "Copied";
      setTimeout(() => { made.textContent = "Copy"; }, 1500);
    });

  update();
})();
