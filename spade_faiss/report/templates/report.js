// Sorts the table by the column whose button is pressed; pressed again, the other way round. What has no value stays
// at the end.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  table.tHead.addEventListener("click", event => {
    const header = event.target.closest("th");
    if (!event.target.closest("button")) return;
    const body = table.tBodies[0], column = header.cellIndex, numbers = header.classList.contains("number");
    const now = header.getAttribute("aria-sort");
    const order = !now ? header.dataset.first : now === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const words = new Intl.Collator("en", { numeric: true });
    const rows = [...body.rows].map(row => [row.cells[column].dataset.value, row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numbers ? a - b : words.compare(a, b));
    });
    body.append(...rows.map(([, row]) => row));
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
  });
}
