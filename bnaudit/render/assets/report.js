// Draws the map, the plots and the list of results from the embedded records. Text of a report reaches the
// page as text nodes and attributes only.
(() => {
  "use strict";

  const STATUSES = ["unavailable", "unsupported", "pass", "warn", "fail", "timeout", "crash"]; // to the worst
  const RAN = STATUSES.slice(2);
  const SIGNS = { unavailable: "–", unsupported: "–", pass: "·", warn: "!", fail: "×", timeout: "…", crash: "†" };
  const SYMBOLS = { pass: "circle", warn: "triangle", fail: "times", timeout: "square", crash: "diamond" };
  const PAGE = 100; // rows of the list that are added at a time
  const RAMP = [-3, 4]; // decades of ×bound from the first colour to the last; the bound has its own, between

  const $ = (id) => document.getElementById(id);

  /** An element with attributes, listeners (functions), and children; strings become text nodes. */
  function el(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity));
    return element;
  }

  // --- the records ---------------------------------------------------------------------------------

  const data = JSON.parse($("data").textContent);
  const records = ({ columns, rows }) =>
    rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));
  const NAMED = { nan: NaN, inf: Infinity, "-inf": -Infinity };
  const real = (value) => (typeof value === "string" ? NAMED[value] : value); // null: does not apply
  const cases = records(data.cases);
  const results = records(data.results);
  const severity = (result) => STATUSES.indexOf(result.status);

  /** A number for comparisons: nothing is less than 0, and nan is as bad as infinity. */
  function size(value) {
    return value === null ? -1 : Number.isNaN(value) ? Infinity : value;
  }

  for (const it of cases) it.condition_number = real(it.condition_number);
  for (const it of results) {
    it.case = cases[it.case];
    it.worst = it.quantity ? quantity(it, it.quantity) : null;
    it.bound_ratio = it.worst?.bound_ratio ?? null;
    it.badness = it.worst?.nonfinite ? Infinity : size(it.bound_ratio);
    const sigma = it.worst?.nonfinite ? Infinity : size(it.worst?.max_sigma_error ?? null);
    it.rank = [severity(it), it.gated, it.quantity === "y", sigma, it.badness];
    it.name = it.gated ? it.backend : `(${it.backend})`;
    it.searched = [it.case.id, it.case.label, it.case.dtype, it.backend, it.status, it.cause, it.reason, it.kernel]
      .join(" ").toLowerCase();
  }

  /** One quantity of a result as a record, null where it was not returned. */
  function quantity(result, name) {
    const row = result.quantities.find(([index]) => data.quantities[index] === name);
    return row === undefined ? null : expand(row);
  }

  function expand(row) {
    const record = Object.fromEntries(data.fields.map((field, i) => [field, row[i]]));
    for (const [field, value] of Object.entries(record))
      if (value in NAMED) record[field] = NAMED[value];
    record.name = data.quantities[row[0]];
    return record;
  }

  function worstFirst(a, b) {
    const i = a.rank.findIndex((part, i) => part !== b.rank[i]);
    return i < 0 ? 0 : a.rank[i] < b.rank[i] ? 1 : -1;
  }
  const unique = (values) => [...new Set(values)];

  // --- numbers -------------------------------------------------------------------------------------

  /** Such as 0.467, 5.5e-5, 7.1e3, nan; "–" for what does not apply. */
  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "∞" : "-∞";
    if (value === 0) return "0";
    const text = Math.abs(value) >= 1e-3 ? value.toPrecision(digits) : value.toExponential(digits - 1);
    const [mantissa, exponent] = text.split("e");
    return Number(mantissa) + (exponent === undefined ? "" : `e${Number(exponent)}`);
  }

  /** A number's bits, as Python's float.hex() writes them. */
  function hex(value) {
    if (value === null) return "";
    if (!Number.isFinite(value)) return number(value).replace("∞", "inf");
    const bits = new DataView(new ArrayBuffer(8));
    bits.setFloat64(0, value);
    const whole = bits.getBigUint64(0);
    const sign = whole >> 63n ? "-" : "";
    const biased = Number((whole >> 52n) & 0x7ffn);
    const fraction = whole & 0xfffffffffffffn;
    if (biased === 0 && fraction === 0n) return `${sign}0x0.0p+0`;
    const exponent = (biased || 1) - 1023;
    const digits = fraction.toString(16).padStart(13, "0");
    return `${sign}0x${biased ? 1 : 0}.${digits}p${exponent < 0 ? "" : "+"}${exponent}`;
  }

  const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

  // --- filters -------------------------------------------------------------------------------------

  const open = new Set(); // scenarios that the map shows case by case
  const order = { column: "status", ascending: false };
  let shown = PAGE;

  function options(select, all, values) {
    select.append(el("option", { value: "" }, all), ...values.map((value) => el("option", { value }, value)));
  }

  function matching() {
    const words = $("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const statuses = new Set([...$("statuses").querySelectorAll(":checked")].map((box) => box.value));
    const [backend, scenario, dtype] = ["backend", "scenario", "dtype"].map((id) => $(id).value);
    return results.filter(
      (it) =>
        statuses.has(it.status) &&
        (!backend || it.backend === backend) &&
        (!scenario || it.case.scenario === scenario) &&
        (!dtype || it.case.dtype === dtype) &&
        (it.gated || !$("gated").checked) &&
        words.every((word) => it.searched.includes(word)),
    );
  }

  function draw() {
    const found = matching();
    $("count").textContent = `${found.length} of ${count(results.length, "result")}`;
    drawMap(found);
    drawPlots(found);
    drawTable(found);
  }

  function buildFilters() {
    options($("backend"), "all", unique(results.map((it) => it.backend)));
    options($("scenario"), "all", unique(cases.map((it) => it.scenario)));
    options($("dtype"), "all", unique(cases.map((it) => it.dtype)));
    for (const status of [...STATUSES].reverse()) {
      const n = results.filter((it) => it.status === status).length;
      if (n) {
        const box = el("input", { type: "checkbox", value: status, checked: true });
        $("statuses").append(
          el("label", { class: "chip" }, box, el("span", { class: `status ${status}` }, status), String(n)),
        );
      }
    }
    let pending = 0;
    const later = () => {
      clearTimeout(pending);
      pending = setTimeout(() => { shown = PAGE; draw(); }, 60);
    };
    $("filters").addEventListener("input", later);
    $("filters").addEventListener("reset", later);
    $("filters").addEventListener("submit", (event) => event.preventDefault());
  }

  // --- the map -------------------------------------------------------------------------------------

  /** Colours a cell by ×bound: between low and even below 1, between even and high above. */
  function heat(cell, badness) {
    if (badness <= 0) return cell.style.setProperty("--heat", "0%");
    const decades = Math.log10(badness);
    const part = decades < 0 ? 1 - decades / RAMP[0] : decades / RAMP[1];
    const percent = Math.round(100 * Math.min(Math.max(part, 0), 1));
    cell.style.setProperty("--heat", `${percent}%`);
    cell.classList.toggle("above", decades >= 0);
    cell.classList.toggle("hot", decades >= 0 && percent > 45);
  }

  function drawMap(found) {
    const rows = new Map(); // backend → case → result
    for (const it of [...found].sort((a, b) => b.gated - a.gated)) {
      if (!rows.has(it.name)) rows.set(it.name, new Map());
      rows.get(it.name).set(it.case, it);
    }
    for (const [name, row] of rows) // such a backend has no colour anywhere
      if ([...row.values()].every((it) => it.status === "unavailable")) rows.delete(name);
    const used = new Set([...rows.values()].flatMap((row) => [...row.keys()]));
    const scenarios = new Map();
    for (const it of cases.filter((it) => used.has(it)))
      scenarios.set(it.scenario, [...(scenarios.get(it.scenario) ?? []), it]);
    const columns = [...scenarios].flatMap(([scenario, members]) =>
      open.has(scenario) ? members.map((it) => ({ scenario, members: [it] })) : [{ scenario, members }],
    );

    const head = el("tr", { role: "row" }, el("td", { role: "gridcell" }));
    for (const [scenario, members] of scenarios) {
      const unfolded = open.has(scenario);
      const toggle = el("button", { type: "button", tabindex: -1, "aria-expanded": String(unfolded),
        "data-scenario": scenario, click: () => fold(scenario, 0, !unfolded) }, scenario);
      head.append(el("th", { role: "columnheader", scope: "col", class: unfolded ? "open" : "folded",
        colspan: unfolded ? members.length : null }, unfolded ? el("div", {}, toggle) : toggle));
    }
    const body = [...rows].map(([name, row], i) =>
      el("tr", { role: "row" },
        el("th", { role: "rowheader", scope: "row", title: name, class: name.startsWith("(") ? "specimen" : null }, name),
        columns.map(({ scenario, members }) => {
          const there = members.map((it) => row.get(it)).filter(Boolean).sort(worstFirst);
          return el("td", { role: "gridcell" }, there.length ? mapCell(name, scenario, there, i + 1) : "");
        }),
      ),
    );
    $("grid").replaceChildren(el("thead", {}, head), el("tbody", {}, body));
    const first = $("grid").querySelector("tbody button") ?? $("grid").querySelector("button");
    if (first) first.tabIndex = 0;
    $("readout").textContent = first ? "" : "Nothing that matches these filters ran.";
  }

  function mapCell(name, scenario, there, row) {
    const [worst] = there;
    const single = open.has(scenario);
    const badness = Math.max(...there.map((it) => it.badness));
    const where = single ? worst.case.label : `worst ${worst.case.label}`;
    const ran = there.filter((it) => RAN.includes(it.status));
    const share = single ? "" : ` ${there.filter((it) => it.status === worst.status).length} of ${ran.length || there.length}`;
    const text = [name, scenario, where, `${worst.status}${share}`,
      ...(ran.length ? [`off by ${worst.off_by}`, `${number(badness < 0 ? null : badness, 2)} × bound`] : [worst.reason ?? ""])].join(" · ");
    const say = () => { $("readout").textContent = text; };
    const cell = el("button", { type: "button", tabindex: -1, class: `cell ${worst.status}${single ? " case" : ""}`,
      "aria-label": text, "data-row": row, "data-scenario": scenario, focus: say, mouseenter: say,
      click: () => (single ? show(worst) : fold(scenario, row, true)) }, SIGNS[worst.status]);
    heat(cell, badness);
    return cell;
  }

  /** Opens or closes a scenario's cases, and keeps the focus in its row; row 0 is the heading. */
  function fold(scenario, row, unfold) {
    if (unfold) open.add(scenario);
    else open.delete(scenario);
    drawMap(matching());
    const mine = [...$("grid").querySelectorAll("button")].filter((it) => it.dataset.scenario === scenario);
    focusCell(mine.find((it) => Number(it.dataset.row ?? 0) === row) ?? mine[0]);
  }

  function focusCell(cell) {
    if (!cell) return;
    for (const other of $("grid").querySelectorAll('button[tabindex="0"]')) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
  }

  /** The map's buttons as a matrix: a heading stands in each column that it spans. */
  function matrix() {
    return [...$("grid").rows].map((row) =>
      [...row.cells].slice(1).flatMap((cell) => Array(cell.colSpan).fill(cell.querySelector("button"))),
    );
  }

  function moveInMap(event) {
    const rows = matrix();
    const y = rows.findIndex((row) => row.includes(event.target));
    if (y < 0) return;
    const x = rows[y].indexOf(event.target);
    const along = (cells) => cells.find((it) => it && it !== event.target);
    const column = rows.map((row) => row[x]);
    const target = {
      ArrowRight: () => along(rows[y].slice(x)),
      ArrowLeft: () => along(rows[y].slice(0, x).reverse()),
      ArrowDown: () => along(column.slice(y)),
      ArrowUp: () => along(column.slice(0, y).reverse()),
      Home: () => along(rows[y]),
      End: () => along([...rows[y]].reverse()),
    }[event.key];
    if (target) {
      event.preventDefault();
      focusCell(target());
    } else if (event.key === "Escape" && open.has(event.target.dataset.scenario)) {
      fold(event.target.dataset.scenario, Number(event.target.dataset.row ?? 0), false);
    }
  }

  // --- the plots -----------------------------------------------------------------------------------

  const LEAST = 1e-20; // deviations below it stand with 0

  /** A logarithmic axis with places for 0 and ∞ beside it, which take what has no logarithm. */
  function logAxis(values) {
    const finite = values.filter((value) => value >= LEAST && Number.isFinite(value));
    const low = Math.floor(Math.min(0, ...finite.map(Math.log10)));
    const high = Math.ceil(Math.max(low + 1, ...finite.map(Math.log10)));
    const gap = Math.max((high - low) / 12, 0.25);
    const step = Math.max(1, Math.ceil((high - low) / 7));
    const ticks = [];
    for (let decade = Math.ceil(low / step) * step; decade <= high; decade += step) ticks.push(decade);
    const least = values.filter((value) => value < LEAST);
    const infinite = values.some((value) => Number.isNaN(value) || value === Infinity);
    return {
      place: (value) => value < LEAST ? low - gap : Number.isFinite(value) ? Math.log10(value) : high + gap,
      domain: [low - (least.length ? 1.5 : 0.3) * gap, high + (infinite ? 1.5 : 0.3) * gap],
      ticks: [...(least.length ? [low - gap] : []), ...ticks, ...(infinite ? [high + gap] : [])],
      tickFormat: (at) => at < low ? (least.some(Boolean) ? `<${power(Math.log10(LEAST))}` : "0") : at > high ? "∞" : power(at),
    };
  }

  const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  function power(exponent) {
    if (exponent >= 0 && exponent <= 2) return String(10 ** exponent);
    return `10${exponent < 0 ? "⁻" : ""}${[...String(Math.abs(exponent))].map((d) => SUPERSCRIPTS[d]).join("")}`;
  }

  function points(found, name, measure) {
    return found
      .filter((it) => RAN.includes(it.status))
      .map((it) => ({ it, q: quantity(it, name) }))
      .filter(({ q }) => q !== null && q[measure] !== null)
      .map(({ it, q }) => ({ it, q, y: q.nonfinite ? Infinity : q[measure] }))
      .sort((a, b) => STATUSES.indexOf(a.q.status) - STATUSES.indexOf(b.q.status) || a.it.gated - b.it.gated);
  }

  /** For each case of a plot of deviations: where ×bound is 1, and the floor. */
  function allowances(dots) {
    const found = new Map();
    for (const { it, q } of dots) {
      const at = found.get(it.case) ?? { case: it.case, bound: 0, floor: 0 };
      const bound = q.max_abs_error / q.bound_ratio;
      if (Number.isFinite(bound)) at.bound = Math.max(at.bound, bound);
      at.floor = Math.max(at.floor, q.floor ?? 0);
      found.set(it.case, at);
    }
    return [...found.values()];
  }

  /** Puts a plot into a box of the page; to a screen reader it is one image, whose numbers the list has. */
  function figure(box, options) {
    const plot = Plot.plot({
      width: box.clientWidth, height: Math.round(Math.min(360, 160 + box.clientWidth / 3)),
      marginLeft: 46, marginRight: 12, marginBottom: 36, color: { type: "identity" }, ...options,
    });
    plot.setAttribute("role", "img");
    for (const marks of plot.querySelectorAll("g[aria-label]")) marks.setAttribute("role", "group");
    box.replaceChildren(plot);
    return plot;
  }

  function scatter(box, dots, field, label, measure) {
    const known = dots.filter(({ it }) => it.case[field] !== null);
    if (!known.length) return box.replaceChildren(el("p", { class: "note" }, "Nothing to plot."));
    const limits = measure === "bound_ratio" ? [] : allowances(known);
    const x = logAxis(known.map(({ it }) => it.case[field]));
    const y = logAxis([...known.map((dot) => dot.y), ...limits.flatMap(({ bound, floor }) => [bound, floor]).filter(Boolean),
      ...(measure === "bound_ratio" ? [1] : [])]);
    const half = (x.domain[1] - x.domain[0]) / 90;
    const tick = (key, options) =>
      Plot.link(limits.filter((at) => at[key] > 0), {
        x1: (at) => x.place(at.case[field]) - half, x2: (at) => x.place(at.case[field]) + half,
        y1: (at) => y.place(at[key]), y2: (at) => y.place(at[key]), className: key, ...options,
      });
    const channels = { x: ({ it }) => x.place(it.case[field]), y: (dot) => y.place(dot.y) };
    const plot = figure(box, {
      ariaLabel: `${dots.length} results, ${label}`,
      x: { domain: x.domain, ticks: x.ticks, tickFormat: x.tickFormat, label, labelAnchor: "center", labelArrow: "none" },
      y: { domain: y.domain, ticks: y.ticks, tickFormat: y.tickFormat, grid: true,
        label: measure === "bound_ratio" ? "×bound" : `deviation of ${$("quantity").value}`, labelArrow: "none" },
      symbol: { domain: Object.keys(SYMBOLS), range: Object.values(SYMBOLS) },
      marks: [
        tick("floor", { stroke: "var(--soft)", strokeWidth: 1.5 }),
        tick("bound", { stroke: "var(--accent)", strokeWidth: 1.5 }),
        measure === "bound_ratio" ? Plot.ruleY([0], { stroke: "var(--accent)", strokeWidth: 1.5, className: "bound" }) : null,
        Plot.dot(known, { ...channels, r: 3, symbol: ({ q }) => q.status,
          stroke: ({ q }) => `var(--${q.status})`, strokeOpacity: 0.75, strokeWidth: 1.2,
          fill: ({ it, q }) => (it.gated ? `var(--${q.status})` : "none"), fillOpacity: 0.55 }),
        Plot.tip(known, Plot.pointer({ ...channels, maxRadius: 25, lineWidth: box.clientWidth < 480 ? 11 : 20,
          title: ({ it, q }) => `${it.name}\n${it.case.scenario}\n${it.case.label}\n${q.name} ${q.status}: off by ${number(q.max_abs_error)}, ${number(q.bound_ratio, 2)} × bound` })),
      ],
    });
    plot.addEventListener("click", () => { if (plot.value) show(plot.value.it); });
  }

  function histogram(box, found, name) {
    const dots = points(found, name, "bound_ratio");
    if (!dots.length) return box.replaceChildren(el("p", { class: "note" }, "Nothing to plot."));
    const x = logAxis(dots.map((dot) => dot.y));
    const width = 0.5;
    const bins = new Map();
    for (const { y, q } of dots) {
      const start = Math.floor(x.place(y) / width) * width;
      const key = `${start} ${q.status}`;
      const bin = bins.get(key) ?? { start, status: q.status, results: 0 };
      bin.results += 1;
      bins.set(key, bin);
    }
    figure(box, {
      ariaLabel: `${dots.length} results by ×bound`,
      x: { domain: [Math.floor(x.domain[0] / width) * width, Math.ceil(x.domain[1] / width) * width], ticks: x.ticks,
        tickFormat: x.tickFormat, label: `×bound of ${name}`, labelAnchor: "center", labelArrow: "none" },
      y: { grid: true, label: "results", labelArrow: "none" },
      marks: [
        Plot.rectY([...bins.values()].sort((a, b) => STATUSES.indexOf(a.status) - STATUSES.indexOf(b.status)), {
          x1: "start", x2: (bin) => bin.start + width, y: "results", fill: (bin) => `var(--${bin.status})`, inset: 0.5,
          tip: true, title: (bin) => `${bin.status}: ${count(bin.results, "result")}` }),
        Plot.ruleX([0], { stroke: "var(--accent)", strokeWidth: 1.5 }),
        Plot.ruleY([0], { stroke: "var(--line)" }),
      ],
    });
  }

  function drawPlots(found) {
    const name = $("quantity").value;
    const measure = $("measure").value;
    const dots = points(found, name, measure);
    $("symbols").lastChild.hidden = measure === "bound_ratio"; // has no floor
    scatter($("by-condition"), dots, "condition_number", "condition number", measure);
    scatter($("by-n"), dots, "n", "n", measure);
    histogram($("histogram"), found, name);
  }

  function buildPlots() {
    $("quantity").append(...data.quantities.map((name) => el("option", { value: name }, name)));
    if (data.quantities.includes("y")) $("quantity").value = "y";
    for (const id of ["quantity", "measure"]) $(id).addEventListener("change", () => drawPlots(matching()));
    let width = $("plots").clientWidth;
    new ResizeObserver(() => {
      if ($("plots").clientWidth !== width) {
        width = $("plots").clientWidth;
        drawPlots(matching());
      }
    }).observe($("plots"));
    const used = RAN.filter((status) => results.some((it) => it.status === status));
    $("signs").append(...used.map((status) => el("span", {}, `${SIGNS[status]} ${status}`)));
    const drawn = (paths) => {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [name, value] of Object.entries({ width: 12, height: 12, viewBox: "-6 -6 12 12" })) svg.setAttribute(name, value);
      const path = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
      for (const [name, value] of Object.entries(paths)) path.setAttribute(name, value);
      return svg;
    };
    const SHAPES = { circle: d3.symbolCircle, triangle: d3.symbolTriangle, times: d3.symbolTimes, square: d3.symbolSquare, diamond: d3.symbolDiamond };
    for (const status of used) {
      const d = d3.symbol(SHAPES[SYMBOLS[status]], 30)();
      $("symbols").append(el("span", {}, drawn({ d, fill: "none", stroke: `var(--${status})`, "stroke-width": 1.4 }), status));
    }
    for (const [name, color] of [["bound", "accent"], ["floor", "soft"]])
      $("symbols").append(el("span", {}, drawn({ d: "M-6,0H6", stroke: `var(--${color})`, "stroke-width": 2 }), name));
  }

  // --- the list ------------------------------------------------------------------------------------

  const floor = (it) => it.worst?.floor ?? null;

  function deviation({ worst }) {
    if (worst === null) return null;
    return worst.nonfinite ? Infinity : (worst.max_sigma_error ?? worst.max_abs_error);
  }

  const COLUMNS = {
    status: { label: "status", sort: worstFirst, cell: (it) => el("span", { class: `status ${it.status}` },
      it.gated ? it.status : `(${it.status})`) },
    backend: { label: "backend", text: (it) => it.backend, cell: (it) => it.name },
    scenario: { label: "scenario", text: (it) => it.case.scenario },
    case: { label: "case", text: (it) => it.case.label,
      cell: (it) => el("button", { type: "button", class: "link", click: () => show(it) }, it.case.label) },
    "off-by": { label: "off by", right: true, value: deviation, cell: (it) => it.off_by },
    bound: { label: "×bound", right: true, value: (it) => it.bound_ratio, cell: (it) => number(it.bound_ratio, 2) },
    floor: { label: "floor", right: true, value: floor, cell: (it) => number(floor(it), 2) },
    condition: { label: "condition", right: true, value: (it) => it.case.condition_number,
      cell: (it) => number(it.case.condition_number, 2) },
    kernel: { label: "kernel", text: (it) => it.kernel ?? "" },
  };

  function sorted(found) {
    const { sort, text, value } = COLUMNS[order.column];
    if (sort) return [...found].sort(order.ascending ? (a, b) => sort(b, a) : sort);
    const sign = order.ascending ? 1 : -1;
    const keyed = found.map((it) => [text ? text(it) : value(it), it]);
    keyed.sort(text
      ? ([a], [b]) => sign * a.localeCompare(b, "en", { numeric: true })
      : ([a], [b]) => (a === null) - (b === null) || sign * ((size(a) > size(b)) - (size(a) < size(b)))); // absent ones last
    return keyed.map(([, it]) => it);
  }

  function drawTable(found) {
    const head = Object.entries(COLUMNS).map(([name, { label, right }]) => {
      const direction = order.column === name ? (order.ascending ? "ascending" : "descending") : null;
      return el("th", { scope: "col", class: `${name}${right ? " right" : ""}`, "aria-sort": direction },
        el("button", { type: "button", "data-column": name, click: () => sortBy(name) }, label));
    });
    const rows = sorted(found).slice(0, shown).map((it) =>
      el("tr", {}, Object.entries(COLUMNS).map(([name, { label, right, cell, text }]) =>
        el("td", { class: `${name}${right ? " right" : ""}`, "data-label": label }, (cell ?? text)(it)))),
    );
    $("table").replaceChildren(el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows));
    const left = found.length - shown;
    $("more").hidden = left <= 0;
    $("more").textContent = `Show ${Math.min(left, PAGE)} more of ${left}`;
  }

  function sortBy(name) {
    const numeric = !COLUMNS[name].text;
    order.ascending = order.column === name ? !order.ascending : !numeric;
    order.column = name;
    drawTable(matching());
    $("table").querySelector(`[data-column="${name}"]`).focus();
  }

  // --- one result ----------------------------------------------------------------------------------

  function definitions(entries, kind = null) {
    return el("dl", { class: kind }, entries.filter(([, value]) => value !== null && value !== "")
      .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
  }

  function quantities(it) {
    const columns = ["quantity", "status", "deviation", "σ", "ulp", "×bound", "T0", "floor", "not finite"];
    const rows = it.quantities.map(expand).map((q) => el("tr", {},
      el("td", {}, q.name), el("td", {}, el("span", { class: `status ${q.status}` }, q.status)),
      [number(q.max_abs_error), number(q.max_sigma_error), number(q.max_ulp_error), number(q.bound_ratio),
        number(q.tight_ratio), number(q.floor), String(q.nonfinite)].map((text) => el("td", { class: "right" }, text))));
    return el("div", { class: "scroll" }, el("table", { class: "list" },
      el("thead", {}, el("tr", {}, columns.map((name, i) => el("th", { scope: "col", class: i > 1 ? "right" : null }, name)))),
      el("tbody", {}, rows)));
  }

  function worstElements(it) {
    const rows = it.quantities.map(expand).filter((q) => q.index !== null).map((q) => [
      el("tr", {}, el("td", { class: "mono" }, `${q.name}[${q.index.join(",")}]`), el("td", { class: "mono" }, "is"),
        el("td", { class: "mono" }, exact(q.value)), el("td", { class: "mono" }, hex(q.value))),
      el("tr", {}, el("td", {}), el("td", { class: "mono" }, "should be"),
        el("td", { class: "mono" }, exact(q.reference)), el("td", { class: "mono" }, hex(q.reference))),
    ]);
    return el("div", { class: "scroll" }, el("table", { class: "list" }, el("tbody", {}, rows)));
  }

  /** How many elements of y and grad_input have which ×bound: boxes, and what draws into them once they are shown. */
  function elementCounts(it) {
    const known = it.quantities.map(expand).filter((q) => q.histogram?.some((n) => n > 0));
    const boxes = known.map(() => el("figure", {}));
    const draw = () => known.forEach((q, k) => {
      const total = q.histogram.reduce((a, b) => a + b);
      const bins = q.histogram.map((n, i) => ({ i, n })).filter(({ n }) => n > 0);
      const edge = (i) => i <= 0 ? "0" : i >= q.histogram.length ? "∞" : number(4 ** (i - 11), 2);
      figure(boxes[k], {
        ariaLabel: `${count(total, "element")} of ${q.name} by ×bound`, height: 160,
        x: { domain: [0, q.histogram.length], ticks: [1, 6, 11, 16, 21], tickFormat: edge,
          label: `×bound of an element of ${q.name}`, labelAnchor: "center", labelArrow: "none" },
        y: { type: "symlog", grid: true, ticks: [1, 100, 1e4, 1e6, 1e8].filter((n) => n < 10 * total), tickFormat: (n) => number(n, 2), label: "elements", labelArrow: "none" },
        marks: [
          Plot.rectY(bins, { x1: "i", x2: ({ i }) => i + 1, y: "n", fill: ({ i }) => i < 11 ? "var(--pass)" : "var(--fail)", inset: 0.5,
            tip: true, title: ({ i, n }) => `${count(n, "element")} from ${edge(i)} to ${edge(i + 1)} times the bound` }),
          Plot.ruleX([11], { stroke: "var(--accent)", strokeWidth: 1.5 }),
          Plot.ruleY([0], { stroke: "var(--line)" }),
        ],
      });
    });
    return { boxes, draw };
  }

  /** A number with all its digits. */
  function exact(value) {
    if (!Number.isFinite(value) || value === 0) return number(value);
    return Math.abs(value) < 1e-3 ? value.toExponential() : String(value);
  }

  /** Fields as words: {distribution: normal, mean: 1} is "normal, mean 1". */
  function words(value) {
    if (value === null || typeof value !== "object") return value === null ? "" : String(value);
    if (Array.isArray(value)) return value.map(words).join(", ");
    return Object.entries(value).map(([key, item]) => (key === "distribution" ? item
      : item !== null && typeof item === "object" ? `${key} (${words(item)})` : `${key} ${item}`)).join(", ");
  }

  /** Opens the details of a result; again while they are open: those of another. */
  function show(it) {
    const c = it.case;
    const others = results.filter((other) => other.case === c && other !== it && RAN.includes(other.status));
    const close = el("button", { type: "button", "aria-label": "Close", click: () => $("detail").close() }, "Close");
    const counts = elementCounts(it);
    const reasons = it.quantities.map(expand).filter((q) => q.reason && !it.reason?.includes(q.reason));
    $("detail").replaceChildren(el("div", {},
      el("div", { class: "head" },
        el("div", {},
          el("h2", { id: "detail-title" }, el("span", { class: `status ${it.status}` }, it.gated ? it.status : `(${it.status})`), ` ${it.backend}`),
          el("p", { class: "where" }, `${c.scenario} ${c.label}`)),
        close),
      it.reason ? el("p", { class: "why" }, it.reason) : "",
      reasons.map((q) => el("p", { class: "why" }, `${q.name}: ${q.reason}`)),
      definitions([["cause", it.cause], ["label", it.label], ["kernel", it.kernel],
        ["finding", it.finding === null ? null : `#${it.finding}`], ["environment", it.environment],
        ["took", it.seconds === null ? null : `${number(real(it.seconds))} s`]], "short"),
      it.quantities.length ? [el("h3", {}, "Quantities"), quantities(it),
        el("h3", {}, "Worst elements"), worstElements(it)] : "",
      counts.boxes.length ? [el("h3", {}, "All elements"), el("div", { class: "figures" }, counts.boxes)] : "",
      it.detail ? [el("h3", {}, "Last words"), el("pre", {}, it.detail)] : "",
      others.length ? [el("h3", {}, "The same case elsewhere"), el("ul", {}, others.map((other) =>
        el("li", {}, el("button", { type: "button", class: "link", click: () => show(other) }, other.name), " ",
          el("span", { class: `status ${other.status}` }, other.status), ` ${number(other.bound_ratio, 2)}`)))] : "",
      el("h3", {}, "Case"),
      definitions([["id", c.id], ["input", words(c.input)], ["shape", c.shape.join(" × ")], ["n", c.n],
        ["condition number", number(c.condition_number)], ["affine", words(c.affine)],
        ["running statistics before", words(c.running)], ["grad_output", words(c.grad_output)],
        ["dtype", c.dtype], ["dtype of the parameters", c.param_dtype], ["memory format", c.memory_format],
        ["mode", c.mode + (c.backward ? ", with backward" : "")], ["eps", exact(real(c.eps))],
        ["momentum", c.momentum === null ? "cumulative average" : real(c.momentum)], ["steps", c.steps], ["thresholds", words(c.thresholds)],
        ["seed", c.seed], ["scenario file", `${c.file}:${c.line}`], ["key", c.key], ["SHA-256 of the input", c.input_sha256]], "parameters"),
    ));
    if (!$("detail").open) $("detail").showModal();
    counts.draw();
    $("detail").scrollTop = 0;
    close.focus();
  }

  // --- the page ------------------------------------------------------------------------------------

  function linkFindings() {
    const worst = new Map();
    for (const it of [...results].sort(worstFirst))
      if (it.finding !== null && !worst.has(it.finding)) worst.set(it.finding, it);
    for (const [finding, it] of worst)
      $(`finding-${finding}`)?.append(el("button", { type: "button", class: "link", click: () => show(it) }, "Details"));
  }

  function switchTheme() {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const other = { dark: "light", light: "dark" };
    const name = () => root.dataset.theme ?? system;
    const say = () => { $("theme").textContent = name() === "dark" ? "Light" : "Dark"; };
    $("theme").addEventListener("click", () => {
      root.dataset.theme = other[name()];
      say();
    });
    say();
  }

  for (const part of document.querySelectorAll(".scripted, #filters, #theme")) part.hidden = false;
  buildFilters();
  buildPlots();
  linkFindings();
  switchTheme();
  $("grid").addEventListener("keydown", moveInMap);
  $("more").addEventListener("click", () => {
    const next = $("table").tBodies[0].rows.length;
    shown += PAGE;
    drawTable(matching());
    $("table").tBodies[0].rows[next]?.querySelector("button")?.focus();
  });
  $("detail").addEventListener("click", (event) => {
    if (event.target === $("detail")) $("detail").close(); // beside its content
  });
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details.gated")) part.open = true;
  });
  draw();
})();
