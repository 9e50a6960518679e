// Elements, and tables that are sorted by a click on a heading.

/** An element; children are nodes or text, so that nothing of what is shown can be markup. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function state(text, kind) {
  return element("span", { class: `state ${kind}` }, text);
}

/** A number over a bar as long as its share of `most`. */
export function bar(value, most, text, kind = "") {
  const fill = element("i", { class: kind });
  fill.style.width = `${most > 0 ? Math.min(100, (100 * (value ?? 0)) / most) : 0}%`;
  return element("span", { class: "bar" }, fill, element("span", {}, text));
}

export class Table {
  /** `columns`: {key, title, number?, cell?(row, most of the column), by?(row)}; `sort`: the first column to sort by, if any. */
  constructor(table, { columns, sort, empty, key }) {
    Object.assign(this, { columns, empty, key, sort: sort ?? null, isReversed: false, rows: [], shown: "" });
    this.head = element("tr");
    this.body = element("tbody");
    table.replaceChildren(element("thead", {}, this.head), this.body);
    this.headings = columns.map((column) => this.heading(column));
    this.head.append(...this.headings);
    this.mark();
  }

  heading(column) {
    const heading = element("th", { scope: "col", class: column.number ? "number" : "" });
    if (!this.sort) {
      heading.append(column.title);
      return heading;
    }
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      this.isReversed = this.sort === column.key ? !this.isReversed : Boolean(column.number);
      this.sort = column.key;
      this.mark();
      this.show(this.rows);
    });
    heading.append(button);
    return heading;
  }

  /** Says by which column and in which direction the rows are sorted, to the eye and to a screen reader. */
  mark() {
    this.columns.forEach((column, idx) => {
      if (!this.sort) return;
      const isSorted = column.key === this.sort;
      const heading = this.headings[idx];
      if (isSorted) heading.setAttribute("aria-sort", this.isReversed ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
      heading.firstChild.textContent = column.title + (isSorted ? (this.isReversed ? " ↓" : " ↑") : "");
    });
  }

  show(rows) {
    this.rows = rows;
    const sorted = this.sorted();
    if (!sorted.length) {
      this.body.replaceChildren(element("tr", {}, element("td", { class: "empty", colspan: this.columns.length }, this.empty)));
      return;
    }
    const most = this.columns.map(({ key }) => Math.max(0, ...sorted.map((row) => (typeof row[key] === "number" ? row[key] : 0))));
    // A row that is replaced takes the keyboard's focus with it, so that is put back on the same request's button.
    const focused = this.body.contains(document.activeElement) ? document.activeElement.closest("tr").dataset.key : null;
    this.body.replaceChildren(...sorted.map((row, idx) => this.row(row, idx, most)));
    if (focused !== null) {
      const again = [...this.body.rows].find((row) => row.dataset.key === focused);
      again?.querySelector("button")?.focus({ preventScroll: true });
    }
  }

  row(row, idx, most) {
    const cells = this.columns.map((column, at) => {
      const content = column.cell ? column.cell(row, most[at]) : String(row[column.key] ?? "–");
      return element("td", { class: column.number ? "number" : "" }, content);
    });
    const node = element("tr", {}, ...cells);
    node.dataset.key = this.key(row, idx);
    return node;
  }

  sorted() {
    const column = this.columns.find(({ key }) => key === this.sort);
    if (!column) return this.rows;
    const value = column.by ?? ((row) => row[column.key]);
    const direction = this.isReversed ? -1 : 1;
    return [...this.rows].sort((a, b) => direction * compare(value(a), value(b)));
  }
}

/** Unknown values come first; texts compare with their numbers as numbers, so that port 80 is before 8000. */
function compare(a, b) {
  if (a == null || b == null) return (a != null) - (b != null);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}
