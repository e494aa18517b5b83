  const form = one("#form"), flagged = one("#flagged");
  const marks = new Map(all(".layers tbody tr").map((row) => [row.dataset.i, []]));
  all(".line,.dot").forEach((mark) => marks.get(mark.dataset.i).push(mark));
  const table = layerTable({
    fits: (row) => (!form.value || row.dataset.form === form.value) && (!flagged || !flagged.checked || "flag" in row.dataset),
    clear: () => {
      form.value = "";
      if (flagged) flagged.checked = false;
    },
    changed: (visible) => {
      for (const [i, lines] of marks) for (const mark of lines) mark.classList.toggle("out", !visible.has(i));
    },
    light: (i, on) => marks.get(i).forEach((mark) => mark.classList.toggle("hot", on)),
  });
  form.addEventListener("change", table.update);
  if (flagged) flagged.addEventListener("change", table.update);
  table.update();
