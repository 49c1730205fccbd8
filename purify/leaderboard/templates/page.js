// Each entry is a tbody: a row of numbers, how they were made, and weaker measurements of the same system.
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const entries = all("tbody"), form = document.querySelector("form"), fields = [...form.elements].filter(f => f.name);

// Sorting: heads become buttons.
const value = (entry, i) => {
  const cell = entry.rows[0].cells[i], text = cell.dataset.value ?? cell.textContent.trim(), number = parseFloat(text);
  return Number.isNaN(number) ? text.toLowerCase() : number;
};
const sort = (table, heads, i) => {
  const down = heads[i].getAttribute("aria-sort") !== "descending";
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[i].setAttribute("aria-sort", down ? "descending" : "ascending");
  [...table.tBodies].sort((a, b) => {
    const last = ("reduced" in a.dataset) - ("reduced" in b.dataset), x = value(a, i), y = value(b, i);
    const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
    return last || (down ? -order : order);
  }).forEach(body => table.append(body));
};
all("table").forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, heads, i));
    head.append(button);
  });
});

// Filters: what is chosen stands in the address, so that a view can be sent to somebody.
const words = text => text.toLowerCase().split(/\s+/).filter(Boolean);
const texts = new Map(entries.map(entry => {
  const copy = entry.cloneNode(true);
  all("code", copy).forEach(command => command.remove());  // it names the run's other rows, too
  return [entry, copy.textContent.toLowerCase()];
}));
const chosen = () => Object.fromEntries([...new FormData(form)].filter(([, text]) => text));
const show = () => {
  const { q = "", passed, ...same } = chosen();
  const fits = entry => Object.entries(same).every(([key, text]) => entry.dataset[key] === text)
    && (!passed || "passed" in entry.dataset)
    && words(q).every(word => texts.get(entry).includes(word));
  entries.forEach(entry => { entry.hidden = !fits(entry); });
  all("figure").forEach(figure => { figure.hidden = same.dataset && figure.dataset.dataset !== same.dataset; });
  const empty = part => all("tbody", part).every(entry => entry.hidden);
  all("section, .scroll").forEach(part => { part.hidden = empty(part); });
  measure();
  const seen = entries.filter(entry => !entry.hidden).length;
  document.querySelector("#count").textContent = `${seen} of ${entries.length} rows`;
};
const restore = () => {
  const stored = new URLSearchParams(location.hash.slice(1));
  fields.forEach(field => {
    if (field.type === "checkbox") field.checked = stored.has(field.name);
    else field.value = stored.get(field.name) ?? "";
    if (field.selectedIndex === -1) field.value = "";  // a value that this page does not have
  });
  show();
};
const store = () => {
  const hash = new URLSearchParams(chosen()).toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  show();
};

// The hint, and a stop for the keyboard, only where a table is wider than the page.
const measure = () => all(".scroll").forEach(part => {
  const wide = part.scrollWidth > part.clientWidth;
  part.previousElementSibling.hidden = !wide;
  part.toggleAttribute("tabindex", false);
  if (wide) part.tabIndex = 0;
});

form.addEventListener("input", store);
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => setTimeout(store));  // after the fields are empty
addEventListener("hashchange", restore);
addEventListener("resize", measure);
form.hidden = false;
restore();
