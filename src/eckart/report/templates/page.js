  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  document.documentElement.classList.add("on");

  const button = (parent, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.append(...parent.childNodes);
    made.addEventListener("click", action);
    parent.append(made);
  };

  // The table of layers with its search and its map. `fits(row)` are the filters of this page alone, `clear()`
  // empties them, `changed(visible)` hears the indices of the rows that are left.
  const layerTable = ({ fits = () => true, clear = () => {}, changed = () => {}, light = () => {} }) => {
    const table = one(".layers"), body = one("tbody", table), rows = all("tr", body);
    const noun = table.dataset.noun;
    const find = one("#find"), shown = one("#shown");
    const cells = all(".map a,.outside a");
    const none = document.createElement("tr");
    none.className = "none";
    none.innerHTML = '<td colspan="' + one("thead tr", table).cells.length + '">No ' + noun +
      " fits. “Show all” brings them back.</td>";

    // What was chosen on the map: {group}, {depth, stack}, {i} or a list {some}; null for nothing.
    let chosen = null;

    const nameOf = (row) => {
      const span = one("th span", row);
      return span.title || span.textContent;
    };
    const texts = new Map(rows.map((row) => [row, (nameOf(row) + " " + row.dataset.group).toLowerCase()]));

    const matches = (row) =>
      texts.get(row).includes(find.value.trim().toLowerCase()) && fits(row) &&
      (!chosen ||
        (chosen.i !== undefined ? row.dataset.i === chosen.i
          : chosen.some ? chosen.some.includes(row.dataset.i)
          : chosen.group !== undefined ? row.dataset.group === chosen.group
          : row.dataset.depth === chosen.depth && nameOf(row).startsWith(chosen.stack)));

    const update = () => {
      const visible = new Set();
      for (const row of rows) {
        row.hidden = !matches(row);
        if (!row.hidden) visible.add(row.dataset.i);
      }
      for (const cell of cells) cell.classList.toggle("faded", !visible.has(cell.dataset.i));
      if (visible.size) none.remove(); else body.append(none);
      shown.textContent = visible.size + " of " + rows.length + " " + noun + "s";
      changed(visible);
    };

    const choose = (what) => {
      const again = chosen && JSON.stringify(chosen) === JSON.stringify(what);
      chosen = again ? null : what;
      update();
      return !again;
    };

    // Sorting: by data-v, else by the number in the text, else by the words; rows without a figure go last.
    const keyOf = (row, column) => {
      const cell = row.cells[column];
      if (cell.dataset.v) return Number(cell.dataset.v);
      const text = column === 0 ? nameOf(row) : cell.textContent.trim();
      if (column === 0 || cell.classList.contains("words")) return text;
      const number = parseFloat(text);
      return Number.isNaN(number) ? null : number;
    };
    const compare = (a, b) =>
      typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a < b ? -1 : a > b ? 1 : 0;
    const sort = (heading, column) => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      all("thead th", table).forEach((th) => th.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = rows.map((row, i) => [keyOf(row, column), i, row]);
      keyed.sort(([a, i], [b, j]) =>
        a === null || b === null ? (a === null) - (b === null) || i - j : (down ? compare(b, a) : compare(a, b)) || i - j);
      body.append(...keyed.map(([, , row]) => row));
    };
    all("thead th", table).forEach((th, column) => {
      if (!("plain" in th.dataset)) button(th, () => sort(th, column));
    });
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
      for (const [name, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]])
        cell.addEventListener(name, () => light(cell.dataset.i, on));
    }
    for (const row of rows) {
      row.addEventListener("mouseenter", () => light(row.dataset.i, true));
      row.addEventListener("mouseleave", () => light(row.dataset.i, false));
    }
    find.addEventListener("input", update);
    one("#reset").addEventListener("click", () => {
      chosen = null;
      find.value = "";
      clear();
      update();
    });
    return { rows, update, choose, nameOf };
  };

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
