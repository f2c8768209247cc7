"use strict";

// What a chart says under the pointer, under a finger, and by the arrow keys.
(() => {
  const tip = document.getElementById("tip");

  const show = (mark, x, y) => {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 14, room))}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
  };
  const hide = () => { tip.hidden = true; };

  for (const title of document.querySelectorAll("svg title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove(); // or the browser would show it as well
  }
  for (const svg of document.querySelectorAll("svg.chart, svg.bars")) {
    const marks = [...svg.querySelectorAll("[data-tip]")];
    let current = -1;
    const choose = (index) => {
      marks[current]?.classList.remove("on");
      current = index;
      marks[current]?.classList.add("on");
    };
    for (const type of ["pointermove", "pointerdown"]) {
      svg.addEventListener(type, (event) => {
        const mark = event.target.closest("[data-tip]");
        choose(marks.indexOf(mark));
        if (mark) show(mark, event.clientX, event.clientY); else hide();
      });
    }
    const leave = () => { choose(-1); hide(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") leave();
      if (!step || !marks.length) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(marks.length - 1, current + step)));
      const box = marks[current].getBoundingClientRect();
      show(marks[current], box.left + box.width / 2, box.top + box.height / 3);
    });
  }
  addEventListener("scroll", hide, { passive: true });
})();

// The table of edits: filter, search, sort, one page of rows at a time. All texts go in as text.
(() => {
  const data = JSON.parse(document.getElementById("edits-data")?.textContent ?? "null");
  if (!data) return;
  const ROWS = matchMedia("(max-width: 760px)").matches ? 25 : 100;
  const rows = data.edits.map((edit, place) => {
    const [id, head, subject, tail, wanted, truth, relation, batch, result, before, after, losses] = edit;
    return { place, id, head, subject, tail, wanted, truth, relation, batch, result, before, after, losses };
  });
  const text = (outcome) => (outcome ? outcome[0].join("") : "");
  const chance = (outcome) => (outcome ? outcome[1] : null);
  const decimals = (value) => (value === null ? "" : value.toFixed(3));
  const plain = (value) => value.normalize("NFKC").toLowerCase();
  const order = new Intl.Collator(undefined, { numeric: true }).compare;
  const places = new Map(data.results.map(([name], place) => [name, place]));

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const marked = (outcome, tag) => {
    const pieces = (outcome?.[0] ?? []).map((piece, i) => (i % 2 ? make(tag, {}, piece) : piece));
    return make("bdi", { className: "said" }, ...pieces);
  };
  const bdi = (value) => make("bdi", {}, value);

  const COLUMNS = [
    { name: "#", key: (r) => r.place, show: (r) => opener(r), number: true },
    { name: "batch", key: (r) => r.batch, show: (r) => String(r.batch ?? ""), number: true, batches: true },
    { name: "prompt", key: (r) => r.head + r.subject + r.tail, show: (r) => make("bdi", {}, r.head, make("b", {}, r.subject), r.tail) },
    { name: "new object", key: (r) => r.wanted, show: (r) => bdi(r.wanted) },
    { name: "before", key: (r) => text(r.before), show: (r) => marked(r.before, "del"), before: true },
    { name: "after", key: (r) => text(r.after), show: (r) => marked(r.after, "ins") },
    { name: "p before", key: (r) => chance(r.before), show: (r) => decimals(chance(r.before)), number: true, before: true },
    { name: "p after", key: (r) => chance(r.after), show: (r) => decimals(chance(r.after)), number: true },
    { name: "result", key: (r) => places.get(r.result), show: (r) => make("span", { className: `result ${r.result.replace(" ", "-")}` }, r.result) },
  ].filter((column) => !(data.measured_only && column.before) && !(column.batches && !data.batches.length));

  const get = (id) => document.getElementById(id);
  const [form, search, result, batch, relation, sort, count, pager] =
    ["filters", "search", "result", "batch", "relation", "sort", "count", "pager"].map(get);
  const body = get("edits").tBodies[0];
  const state = { column: 0, down: false, page: 0, found: rows, open: new Set() };

  const option = (select, value, label) => select.append(make("option", { value }, label));
  for (const [name, meaning] of data.results) option(result, name, `${name}: ${meaning}`);
  for (const number of data.batches) option(batch, String(number), String(number));
  for (const name of data.relations) option(relation, name, name);
  batch.parentNode.hidden = !data.batches.length;
  relation.parentNode.hidden = !data.relations.length;
  COLUMNS.forEach((column, index) => {
    const button = make("button", { type: "button" }, column.name);
    button.addEventListener("click", () => arrange(index, index === state.column && !state.down));
    const head = make("th", { scope: "col", className: column.number ? "number" : "" }, button);
    head.setAttribute("role", "columnheader");
    get("edits").tHead.rows[0].append(head);
    option(sort, `${index} up`, `${column.name} ↑`);
    option(sort, `${index} down`, `${column.name} ↓`);
  });

  function opener(row) {
    const open = state.open.has(row.place);
    const button = make("button", { type: "button", className: "opener" }, String(row.place + 1));
    button.setAttribute("aria-expanded", String(open));
    button.setAttribute("aria-label", `Details of edit ${row.place + 1}`);
    button.addEventListener("click", () => {
      if (!state.open.delete(row.place)) state.open.add(row.place);
      draw();
      body.querySelector(`[data-place="${row.place}"] .opener`).focus();
    });
    return button;
  }

  const shown = (value, percent) =>
    value === null || value === undefined ? "-" : percent ? `${(100 * value).toFixed(1)}%` : value.toPrecision(4);

  function details(row) {
    const stages = [["unedited", row.before], [data.measured_only ? "measured" : "edited", row.after]].filter((s) => s[1]);
    const numbers = [["p of the new object", false, "", (o) => o[1]], ["p of the true object", false, "", (o) => o[2]]];
    data.metrics.forEach(([title, percent, better], i) => numbers.push([title, percent, better, (o) => o[3][i]]));
    const lines = numbers.map(([title, percent, better, read]) => make("tr", {},
      make("th", { scope: "row" }, title, make("span", { className: "quiet" }, better === "lower" ? " lower is better" : "")),
      ...stages.map(([, outcome]) => make("td", { className: "number" }, shown(read(outcome), percent)))));
    const table = make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""), ...stages.map(([name]) => make("th", { scope: "col", className: "number" }, name)))),
      make("tbody", {}, ...lines));
    const facts = [["case", row.id], ["true object", row.truth ?? "not given"], ["relation", row.relation]]
      .concat(row.losses.map(([layer, loss, steps]) => [`target of layer ${layer}`, `loss ${shown(loss)} nats after ${steps} steps`]))
      .filter(([, value]) => value !== "");
    const list = make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, bdi(value))]));
    const cell = make("td", { colSpan: COLUMNS.length }, make("div", { className: "details" }, list, ...(stages.length ? [table] : [])));
    return role(make("tr", { className: "more" }, role(cell, "cell")), "row");
  }

  // At narrow widths rows are no longer laid out as a table; their roles keep them one.
  function role(element, name) {
    element.setAttribute("role", name);
    return element;
  }

  function line(row) {
    const cells = COLUMNS.map((column) => {
      const cell = make("td", { className: column.number ? "number" : "" }, column.show(row));
      cell.dataset.label = column.name;
      return role(cell, "cell");
    });
    const element = role(make("tr", {}, ...cells), "row");
    element.dataset.place = row.place;
    return element;
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(state.found.length / ROWS));
    state.page = Math.min(state.page, pages - 1);
    const first = state.page * ROWS;
    const part = state.found.slice(first, first + ROWS);
    body.replaceChildren(...part.flatMap((r) => (state.open.has(r.place) ? [line(r), details(r)] : [line(r)])));
    [...get("edits").tHead.rows[0].cells].forEach((head, index) => {
      head.setAttribute("aria-sort", index === state.column ? (state.down ? "descending" : "ascending") : "none");
    });
    sort.value = `${state.column} ${state.down ? "down" : "up"}`;
    const range = part.length ? `, ${(first + 1).toLocaleString("en")} to ${(first + part.length).toLocaleString("en")} shown` : "";
    count.textContent = `${state.found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} ${data.measured_only ? "requests" : "edits"}${range}.`;
    pager.hidden = pages === 1;
    const step = (label, page) => {
      const button = make("button", { type: "button", disabled: page < 0 || page >= pages }, label);
      button.addEventListener("click", () => {
        state.page = page;
        draw();
        form.scrollIntoView();
      });
      return button;
    };
    pager.replaceChildren(step("First", state.page ? 0 : -1), step("Previous", state.page - 1),
      make("span", {}, `page ${state.page + 1} of ${pages}`),
      step("Next", state.page + 1), step("Last", state.page + 1 < pages ? pages - 1 : pages));
  }

  function filter() {
    const words = plain(search.value).split(/\s+/).filter(Boolean);
    state.found = rows.filter((row) => {
      if (result.value && row.result !== result.value) return false;
      if (batch.value && String(row.batch) !== batch.value) return false;
      if (relation.value && row.relation !== relation.value) return false;
      row.all ??= plain([row.id, row.head + row.subject + row.tail, row.wanted, row.truth ?? "", row.relation, text(row.before), text(row.after)].join("\n"));
      return words.every((word) => row.all.includes(word));
    });
    state.page = 0;
    arrange(state.column, state.down);
  }

  function arrange(index, down) {
    Object.assign(state, { column: index, down });
    const { key } = COLUMNS[index];
    const sign = down ? -1 : 1;
    state.found.sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === null || b === null) return (a === null) - (b === null) || one.place - other.place; // none: last
      return sign * (typeof a === "number" ? a - b : order(a, b)) || one.place - other.place;
    });
    draw();
  }

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  for (const select of [result, batch, relation]) select.addEventListener("change", filter);
  sort.addEventListener("change", () => {
    const [index, way] = sort.value.split(" ");
    arrange(Number(index), way === "down");
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { state.column = 0; state.down = false; filter(); }));
  filter();
})();
