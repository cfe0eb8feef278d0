// The table: sorted by the column whose heading was pressed, the other way round at the second time.

function valueOf(row, column) {
  const text = row.cells[column].dataset.value;
  if (text === undefined) return undefined;
  const number = Number(text);
  return Number.isNaN(number) ? text : number;
}

function compareValues(left, right) {
  if (typeof left === "string" || typeof right === "string") return String(left).localeCompare(String(right));
  return left - right;
}

function sortRows(body, column, sign) {
  const rows = [...body.rows].map((row) => ({ row, value: valueOf(row, column) }));
  // Rows without a value stay last both ways.
  rows.sort((a, b) => {
    if (a.value === undefined || b.value === undefined) return (a.value === undefined) - (b.value === undefined);
    return sign * compareValues(a.value, b.value);
  });
  body.append(...rows.map(({ row }) => row));
}

function startTable() {
  const table = document.getElementById("numbers");
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      sortRows(table.tBodies[0], column, order === "ascending" ? 1 : -1);
    });
  });
}
