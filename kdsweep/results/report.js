// Each heading of a table becomes a button: a click sorts by its column, ascending, and the next click descending.
// Columns of the class number are sorted as numbers, others as text; gaps come last, and an error stays below its row.
for (const heading of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = "Sort by this column";
  button.append(...heading.childNodes);
  button.addEventListener("click", () => sort(heading));
  heading.append(button);
}

function sort(heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = heading.closest("table").tBodies[0];
  const groups = [];
  for (const row of body.rows) {
    if (row.classList.contains("error")) groups.at(-1).rows.push(row);
    else groups.push({ rows: [row], key: key(row.cells[heading.cellIndex], heading.classList.contains("number")) });
  }
  groups.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    const order = typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
    return ascending ? order : -order;
  });
  body.append(...groups.flatMap(group => group.rows));
}

function key(cell, isNumber) {
  const text = cell.dataset.value || cell.textContent.trim();
  if (text === "" || text.startsWith("\u2013")) return null;
  if (!isNumber) return text;
  const number = parseFloat(text.replace(/[<,]/g, ""));
  return Number.isNaN(number) ? null : number;
}
