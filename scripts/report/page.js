// Charts, sliders and filters of the page. Text from the runs is only ever set as textContent.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
  const MAX_BANDS = 4;
  const MARKERS = ["circle", "square", "triangle", "diamond"];

  function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  // ---- state that outlives a reload

  const STORE = "report:" + location.pathname;
  let state = { hidden: [], only: null, sort: {} };
  try { state = { ...state, ...JSON.parse(sessionStorage.getItem(STORE) || "{}") }; } catch { /* storage is switched off */ }

  function save() {
    try { sessionStorage.setItem(STORE, JSON.stringify(state)); } catch { /* the page works without it */ }
  }

  // A control keeps its value under its id.
  function keep(control, changed) {
    const key = control.type === "checkbox" ? "checked" : "value";
    if (control.id in state) control[key] = state[control.id];
    if (key === "value" && control.tagName === "SELECT" && control.selectedIndex < 0) control.selectedIndex = 0;
    control.addEventListener("input", () => { state[control.id] = control[key]; save(); changed(); });
  }

  // ---- colors

  const probe = element("span", { hidden: true });
  document.body.append(probe);
  function color(css) { // as the canvas needs it: without variables
    probe.style.color = css;
    return getComputedStyle(probe).color;
  }
  const runColor = (run) => `var(--c${data.runs[run].color})`;
  const runDash = (run) => data.runs[run].dash.map((part) => 1.5 * part);

  // ---- numbers

  function short(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : `${+value.toPrecision(4)}`;
  }

  function linearTicks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((k) => k * power).reduce((best, s) => (Math.abs(Math.log(s / rough)) < Math.abs(Math.log(best / rough)) ? s : best));
    const ticks = [];
    for (let k = Math.ceil(low / step); k * step <= high + 1e-9 * step; k++) ticks.push(+(k * step).toPrecision(12));
    return ticks;
  }

  function logTicks(low, high) {
    if (high / low < 6) return linearTicks(low, high, 5).filter((tick) => tick > 0);
    const decades = Math.log10(high / low), factors = decades < 1.5 ? [1, 2, 3, 5, 7] : decades < 4 ? [1, 2, 5] : [1];
    const ticks = [], every = Math.max(1, Math.ceil(decades / 8));
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p += every)
      for (const factor of factors) if (factor * 10 ** p >= low && factor * 10 ** p <= high) ticks.push(+(factor * 10 ** p).toPrecision(12));
    return ticks;
  }

  // ---- a chart

  // lines: {name, color, dash, width, alpha, x, y, low, high (a band), bars (half intervals), marker, quiet}
  // floors: {name, value, bar}
  function draw(box, lines, { logX, logY, xLabel, label, ticks, floors = [] }) {
    box.chart?.destroy();
    box.replaceChildren();
    const shown = lines.map((line) => {
      const rows = line.x.map((_, i) => i).filter((i) => Number.isFinite(line.x[i]) && line.y[i] !== null
        && (!logX || line.x[i] > 0) && (!logY || line.y[i] > 0));
      const pick = (values) => values && rows.map((i) => values[i]);
      const y = pick(line.y), low = pick(line.low)?.map((value, i) => (logY && value <= 0 ? y[i] : value));
      return { ...line, x: pick(line.x), y, low, high: pick(line.high), bars: pick(line.bars) };
    }).filter((line) => line.x.length);
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", `${label}: ${shown.filter((line) => !line.quiet).map((line) => `${line.name} ends at ${short(line.y.at(-1))}`).join(", ") || "no values"}`);
    box.tabIndex = 0;
    if (!shown.length) {
      box.append(element("p", { className: "muted", textContent: logX || logY ? "No values above 0 to show." : "No values to show." }));
      return;
    }
    const tables = [], series = [{}], bands = [];
    for (const line of shown) {
      const stroke = color(line.color), look = { stroke, width: line.width ?? 1.75, dash: line.dash, alpha: line.alpha ?? 1, spanGaps: true, points: { show: line.x.length < 2, size: 6, fill: stroke } };
      if (line.low) {
        tables.push([line.x, line.high], [line.x, line.low]);
        series.push({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } }, { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
        bands.push({ series: [series.length - 2, series.length - 1], fill: color(`color-mix(in srgb, ${line.color} 20%, transparent)`) });
      }
      tables.push([line.x, line.y]);
      series.push({ ...look, points: line.marker ? { show: false } : look.points });
    }
    const values = (pick) => shown.flatMap(pick).filter(Number.isFinite);
    const extra = [...floors.map((floor) => floor.value), ...values((line) => (line.bars ? line.y.flatMap((y, i) => [y - line.bars[i], y + line.bars[i]]) : []))]
      .filter((value) => !logY || value > 0);
    const range = (log, more, pad) => (chart, low, high) => {
      if (low === null) return [log ? 1 : 0, log ? 10 : 1];
      low = Math.min(low, ...more);
      high = Math.max(high, ...more);
      if (log) return [low / pad ** (low === high ? 3 : 1), high * pad ** (low === high ? 3 : 1)];
      const margin = (high - low) * (pad - 1) || Math.abs(high) * 0.05 || 1;
      return [low - margin, high + margin];
    };
    const text = color("var(--muted)"), rule = color("var(--line)"), font = "12px system-ui, sans-serif";
    const axis = (log, given) => ({
      stroke: text, font, labelFont: font, labelSize: 18, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1, size: 4 }, gap: 4,
      splits: (chart, index, low, high) => {
        const across = chart.axes[index].side % 2 === 0, size = across ? chart.bbox.width : chart.bbox.height;
        const candidates = given ? given.filter((tick) => tick >= low && tick <= high) : log ? logTicks(low, high) : linearTicks(low, high, Math.max(3, size / devicePixelRatio / (across ? 75 : 40)));
        const gap = across ? 34 : 14, places = [];
        return candidates.filter((tick) => {
          const place = chart.valToPos(tick, across ? "x" : "y");
          return places.every((other) => Math.abs(other - place) >= gap) && places.push(place);
        });
      },
      filter: (chart, splits) => splits,
      values: (chart, splits) => splits.map(short),
    });
    const marks = (chart) => {
      const ctx = chart.ctx, px = devicePixelRatio, { left, top, width, height } = chart.bbox;
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, width, height);
      ctx.clip();
      floors.forEach((floor, i) => {
        const at = (value) => chart.valToPos(value, "y", true);
        if (logY && floor.value <= 0) return;
        if (floor.bar && (!logY || floor.bar < floor.value)) {
          ctx.fillStyle = color("color-mix(in srgb, var(--muted) 11%, transparent)");
          ctx.fillRect(left, at(floor.value + floor.bar), width, at(floor.value - floor.bar) - at(floor.value + floor.bar));
        }
        ctx.strokeStyle = text;
        ctx.lineWidth = px;
        ctx.setLineDash(i % 2 ? [2 * px, 3 * px] : [6 * px, 4 * px]);
        ctx.beginPath();
        ctx.moveTo(left, at(floor.value));
        ctx.lineTo(left + width, at(floor.value));
        ctx.stroke();
      });
      ctx.setLineDash([]);
      for (const line of shown.filter((candidate) => candidate.marker)) {
        ctx.strokeStyle = ctx.fillStyle = color(line.color);
        ctx.lineWidth = 1.5 * px;
        line.x.forEach((x, i) => {
          const at = chart.valToPos(x, "x", true), y = chart.valToPos(line.y[i], "y", true), r = 4 * px;
          if (line.bars?.[i]) {
            const low = logY && line.y[i] <= line.bars[i] ? top + height : chart.valToPos(line.y[i] - line.bars[i], "y", true);
            const high = chart.valToPos(line.y[i] + line.bars[i], "y", true);
            ctx.beginPath();
            ctx.moveTo(at, low);
            ctx.lineTo(at, high);
            for (const end of [low, high]) { ctx.moveTo(at - r, end); ctx.lineTo(at + r, end); }
            ctx.stroke();
          }
          ctx.beginPath();
          if (line.marker === "circle") ctx.arc(at, y, r, 0, 7);
          if (line.marker === "square") ctx.rect(at - r, y - r, 2 * r, 2 * r);
          if (line.marker === "triangle") { ctx.moveTo(at, y - 1.2 * r); ctx.lineTo(at + 1.1 * r, y + r); ctx.lineTo(at - 1.1 * r, y + r); }
          if (line.marker === "diamond") { ctx.moveTo(at, y - 1.3 * r); ctx.lineTo(at + 1.3 * r, y); ctx.lineTo(at, y + 1.3 * r); ctx.lineTo(at - 1.3 * r, y); }
          ctx.fill();
        });
      }
      ctx.restore();
    };
    const tip = element("div", { className: "tip", hidden: true });
    tip.setAttribute("aria-live", "polite");
    const point = (chart) => {
      const { left, top } = chart.cursor;
      tip.hidden = !(left >= 0);
      if (tip.hidden) return;
      const x = chart.posToVal(left, "x");
      const distance = (value) => Math.abs(chart.valToPos(value, "x") - left);
      const rows = shown.filter((line) => !line.quiet).map((line) => {
        const i = line.x.reduce((best, value, k) => (distance(value) < distance(line.x[best]) ? k : best), 0);
        return { line, i, dy: Math.abs(chart.valToPos(line.y[i], "y") - top), dx: distance(line.x[i]) };
      }).filter((row) => row.dx < 60).sort((a, b) => a.dy - b.dy).slice(0, 8).sort((a, b) => b.line.y[b.i] - a.line.y[a.i]);
      tip.hidden = !rows.length;
      if (tip.hidden) return;
      const nearest = rows.reduce((best, row) => (row.dx < best.dx ? row : best), rows[0]);
      tip.replaceChildren(element("div", { className: "muted", textContent: `${xLabel} ${short(nearest.line.x[nearest.i])}` }));
      for (const { line, i } of rows) {
        const key = element("i");
        key.style.background = line.color;
        const note = line.bars?.[i] ? ` ± ${short(line.bars[i])}` : line.low ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
        tip.append(element("div", {}, key, `${line.name}: ${short(line.y[i])}${note}`));
      }
      const beside = left + chart.over.offsetLeft, right = beside > box.clientWidth / 2;
      tip.style.left = right ? "" : `${beside + 14}px`;
      tip.style.right = right ? `${box.clientWidth - beside + 14}px` : "";
      tip.style.top = "8px";
    };
    const size = () => ({ width: Math.max(200, box.clientWidth), height: box.closest(".wide") ? (innerWidth < 600 ? 320 : 400) : 230 });
    const chart = new uPlot({
      ...size(), series, bands, legend: { show: false }, hooks: { draw: [marks], setCursor: [point] },
      cursor: { points: { show: false }, y: false, drag: { x: true, y: false, setScale: true } },
      scales: { x: { time: false, distr: logX ? 3 : 1, range: range(logX, [], logX ? 1.15 : 1.02) }, y: { distr: logY ? 3 : 1, range: range(logY, extra, logY ? 1.12 : 1.06) } },
      axes: [{ ...axis(logX, ticks), label: xLabel, size: 28 }, { ...axis(logY), size: 56 }],
    }, uPlot.join(tables), box);
    box.append(tip);
    box.chart = chart;
    box.fit = () => { const now = size(); if (now.width !== chart.width || now.height !== chart.height) chart.setSize(now); };
    box.move = (by) => {
      const width = chart.over.clientWidth, left = chart.cursor.left >= 0 ? chart.cursor.left : width / 2;
      chart.setCursor({ left: Math.min(width - 1, Math.max(0, left + by)), top: chart.over.clientHeight / 2 });
    };
    box.leave = () => chart.setCursor({ left: -10, top: -10 });
  }

  const resized = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.fit?.()));
  function chartBox(box = element("div", { className: "chart" })) {
    resized.observe(box);
    box.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -12, ArrowRight: 12 }[event.key];
      if (by) { event.preventDefault(); box.move?.(by); }
      if (event.key === "Escape") box.leave?.();
    });
    box.addEventListener("blur", () => box.leave?.());
    return box;
  }

  // ---- which runs are shown

  const words = all("#run-table tbody tr").sort((a, b) => a.dataset.run - b.dataset.run).map((row) => row.dataset.words.toLowerCase());
  const filter = one("#filter");
  const listed = (run) => filter.value.toLowerCase().split(/\s+/).every((word) => words[run].includes(word));
  const isShown = (run) => listed(run) && (state.only === null ? !state.hidden.includes(data.runs[run].name) : data.runs[run].name === state.only);
  const visible = () => data.runs.map((_, i) => i).filter(isShown);
  if (!data.runs.some((run) => run.name === state.only)) state.only = null;

  function fillLegends() {
    for (const legend of all(".legend")) {
      const focused = legend.contains(document.activeElement) ? document.activeElement.dataset.run : null;
      legend.replaceChildren(...data.runs.map((run, i) => i).filter(listed).map((i) => {
        const name = data.runs[i].name;
        const button = element("button", { type: "button" }, one(`#run-table tr[data-run="${i}"] .swatch`).cloneNode(true), name);
        button.dataset.run = i;
        button.setAttribute("aria-pressed", isShown(i));
        button.title = "Show this run alone; again: all";
        button.addEventListener("click", () => { state.only = state.only === name ? null : name; update(); });
        return button;
      }));
      if (focused !== null) one(`[data-run="${focused}"]`, legend)?.focus();
      legend.hidden = data.runs.length < 2;
    }
  }

  function update() {
    save();
    for (const row of all("[data-run]")) {
      const run = +row.dataset.run;
      if (row.closest("#metric-table")) row.hidden = !row.dataset.run.split(" ").some((owner) => isShown(+owner)); // real images: of several
      else if (row.closest("#run-table")) {
        row.hidden = !listed(run);
        row.classList.toggle("off", !isShown(run));
        one(".shown", row).checked = isShown(run);
      } else if (!row.closest(".legend")) row.hidden = !isShown(run);
    }
    fillLegends();
    drawCurves();
    drawQuality();
    showPreviews();
    showGrids();
  }

  for (const box of all("#run-table .shown")) box.addEventListener("input", () => {
    const name = data.runs[+box.closest("tr").dataset.run].name;
    if (state.only !== null) { state.hidden = data.runs.map((run) => run.name).filter((other) => other !== state.only); state.only = null; }
    state.hidden = box.checked ? state.hidden.filter((other) => other !== name) : [...state.hidden, name];
    update();
  });
  one("#show-all").addEventListener("click", () => { state.hidden = []; state.only = null; filter.value = state.filter = ""; update(); });

  // ---- curves

  const axisNames = { step: "step", images: "training images", hours: "hours" };
  const columns = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves.columns)))];
  const bins = (prefix) => columns.filter((name) => name.startsWith(prefix)).sort();
  const binName = (key) => `${key.slice(-3)}–${(+key.slice(-3) + 0.1).toFixed(1)}`;
  const ofEvaluation = columns.filter((name) => data.metrics.includes(name.split("[")[0])); // FD-mnist[3]: of a class
  // exact: never smoothed, as it is logged rarely or without noise
  const panels = [
    { title: "Loss", keys: ["loss"] },
    { title: "Loss by time t", keys: bins("loss_t_"), bins: true },
    { title: "Validation loss", keys: ["validation_loss"], exact: true },
    { title: "Validation loss by time t", keys: bins("validation_loss_t_"), bins: true, exact: true },
    { title: "Evaluation during training", keys: ofEvaluation, exact: true },
    { title: "Gradient norm", keys: ["grad_norm", "grad_norm_median", "grad_norm_max"], names: { grad_norm: "mean", grad_norm_median: "median", grad_norm_max: "largest" } },
    { title: "Learning rate", keys: ["learning_rate"], exact: true },
    { title: "Images per second", keys: ["images_per_second"] },
    { title: "Loss scale", keys: ["loss_scale"], exact: true },
    { title: "Skipped steps", keys: ["skipped_steps"], exact: true, dull: 0 },
  ];
  const known = new Set(panels.flatMap((panel) => panel.keys));
  panels.push(...columns.filter((name) => !known.has(name)).map((name) => ({ title: name, keys: [name] })));
  const isDull = ({ keys, dull }) => dull !== undefined && data.runs.every((run) => keys.every((key) => (run.curves.columns[key]?.y ?? []).every((value) => value === dull || value === null)));

  function smoothed(values, weight) { // exponential moving average, without the pull to 0 of its start
    let sum = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  function curveLines(run, key, look, weight) {
    const { columns: own, ...axes } = data.runs[run].curves, column = own[key], x = axes[one("#axis").value];
    if (!column) return [];
    if (!weight) return [{ ...look, x, ...column }];
    const raw = column.low ? [] : [{ ...look, x, y: column.y, alpha: 0.25, width: 1, quiet: true }];
    return [...raw, { ...look, x, ...column, y: smoothed(column.y, weight) }];
  }

  // Whether the largest of the values, all above 0, is so far from their median that a linear axis would show it alone.
  function spans(key) {
    const values = data.runs.flatMap((run) => run.curves.columns[key]?.y ?? []).filter((value) => value !== null).sort((a, b) => a - b);
    return values.length > 2 && values[0] > 0 && values.at(-1) > 20 * values[values.length >> 1];
  }

  const host = one("#panels"), built = [];
  if (host) for (const panel of panels) {
    panel.keys = panel.keys.filter((key) => columns.includes(key));
    if (!panel.keys.length || isDull(panel)) continue;
    const id = `panel-${panel.title}`, log = element("input", { type: "checkbox", id: `${id}-log` });
    const head = element("div", { className: "head" }, element("h3", { textContent: panel.title }));
    let choice = null;
    if (panel.bins || panel.keys.length > 1) {
      choice = element("select", { id });
      choice.setAttribute("aria-label", `${panel.title}: what is shown`);
      const option = (value, text) => element("option", { value, textContent: text });
      const names = panel.keys.map((key) => option(key, panel.names?.[key] ?? (panel.bins ? `t ${binName(key)}, all runs` : key)));
      if (panel.bins) choice.append(...data.runs.map((run, i) => ({ run, i })).filter(({ run }) => panel.keys.some((key) => key in run.curves.columns)).map(({ run }) => option(`run ${run.name}`, `all t, ${run.name}`)));
      choice.append(...names);
      head.append(choice);
      keep(choice, () => panel.draw());
    }
    log.checked = spans(panel.keys[0]);
    head.append(element("label", {}, log, " log"));
    keep(log, () => panel.draw());
    const box = chartBox(), legend = element("ul", { className: "lines" });
    host.append(element("div", { className: "panel" }, head, box, legend));
    panel.draw = () => {
      const weight = panel.exact ? 0 : +one("#smooth").value, value = choice?.value ?? panel.keys[0];
      let lines, parts = [];
      if (value.startsWith("run ")) {
        const run = data.runs.findIndex((candidate) => candidate.name === value.slice(4));
        parts = panel.keys.map((key, i) => ({ name: binName(key), color: `color-mix(in oklab, var(--c1) ${Math.round((100 * i) / Math.max(1, panel.keys.length - 1))}%, var(--c5))`, key }));
        lines = parts.flatMap(({ key, ...look }) => curveLines(run, key, { ...look, width: 1.25 }, weight).map(({ low, high, ...line }) => line));
      } else {
        const runs = visible();
        lines = runs.flatMap((run) => curveLines(run, value, { name: data.runs[run].name, color: runColor(run), dash: runDash(run) }, weight));
        if (runs.length > MAX_BANDS) lines = lines.map(({ low, high, ...line }) => line); // more of them hide each other
      }
      draw(box, lines, { logX: one("#log-x").checked, logY: log.checked, xLabel: axisNames[one("#axis").value], label: panel.title });
      legend.replaceChildren(...parts.map((part) => lineItem(part.name, part.color, [], null)));
    };
    built.push(panel);
  }
  const drawCurves = () => { if (host) { one('output[for="smooth"]').textContent = one("#smooth").value; built.forEach((panel) => panel.draw()); } };
  if (host) for (const control of all("#curves .keep")) keep(control, drawCurves);

  function lineItem(name, css, dash, marker) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const add = (tag, attributes) => {
      const node = document.createElementNS(svg.namespaceURI, tag);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      node.style.stroke = css;
      node.style.fill = tag === "line" ? "none" : css;
      svg.append(node);
    };
    svg.setAttribute("viewBox", "0 0 34 12");
    svg.setAttribute("aria-hidden", "true");
    add("line", { x1: 1, y1: 6, x2: 33, y2: 6, "stroke-width": 2, "stroke-dasharray": dash.join(" ") });
    if (marker === "circle") add("circle", { cx: 17, cy: 6, r: 3.5 });
    if (marker === "square") add("rect", { x: 13.5, y: 2.5, width: 7, height: 7 });
    if (marker === "triangle") add("path", { d: "M17 1.5 L21 10 L13 10 Z" });
    if (marker === "diamond") add("path", { d: "M17 1 L22 6 L17 11 L12 6 Z" });
    return element("li", {}, svg, name);
  }

  // ---- quality

  const metric = one("#metric"), cost = one("#cost");
  if (metric) {
    metric.append(...data.metrics.map((name) => element("option", { value: name, textContent: name })));
    if (data.lines.every((line) => line.points.every((point) => point.NFE === point.forwards))) cost.parentElement.hidden = true;
    for (const control of all("#quality .keep")) keep(control, drawQuality);
    chartBox(one("#quality-chart"));
  }

  function drawQuality() {
    if (!metric) return;
    const name = metric.value, runs = visible(), measured = runs.filter((run) => data.lines.some((line) => line.run === run));
    const counts = {};
    const lines = data.lines.filter((line) => runs.includes(line.run)).map((line) => {
      const points = line.points.filter((point) => point[cost.value] && name in point.values).sort((a, b) => a[cost.value] - b[cost.value]);
      const k = (counts[line.run] = (counts[line.run] ?? -1) + 1);
      const alone = measured.length === 1;
      return {
        name: data.runs.length > 1 ? `${data.runs[line.run].name}: ${line.name}` : line.name,
        color: alone ? `var(--c${k % 7})` : runColor(line.run), dash: alone ? DASHES[k % 4] : runDash(line.run), marker: MARKERS[k % 4],
        x: points.map((point) => point[cost.value]), y: points.map((point) => point.values[name][0]), bars: points.map((point) => point.values[name][1]),
      };
    }).filter((line) => line.x.length);
    const floors = data.floors.filter((floor) => name in floor.values && runs.includes(floor.run))
      .map((floor) => ({ name: floor.name, value: floor.values[name][0], bar: floor.values[name][1] }))
      .filter((floor, i, list) => list.findIndex((other) => other.name === floor.name && other.value === floor.value) === i);
    const ticks = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    draw(one("#quality-chart"), lines, {
      logX: one("#quality-log-x").checked, logY: one("#quality-log-y").checked, ticks: ticks.length < 15 ? ticks : undefined, floors, label: `${name} against ${cost.value}`,
      xLabel: cost.value === "NFE" ? "velocity evaluations per image (NFE)" : "network calls per image",
    });
    one("#quality-lines").replaceChildren(...lines.map((line) => lineItem(line.name, line.color, line.dash, line.marker)),
      ...floors.map((floor, i) => lineItem(floor.name, "var(--muted)", i % 2 ? [2, 3] : [6, 4], null)));
  }

  // ---- previews, and grids along the trajectory

  // The items of a list for which the distance is smallest.
  const nearest = (list, distance) => {
    const least = Math.min(...list.map(distance));
    return list.filter((item) => distance(item) === least);
  };
  const sorted = (values) => [...new Set(values)].sort((a, b) => a - b);

  // A slider over values, which starts at the index `start`; its value, not its place, is kept under the name `key`.
  function valueSlider(control, values, start, key, changed) {
    control.max = values.length - 1;
    const kept = values.indexOf(state[key]);
    control.value = kept >= 0 ? kept : start;
    control.addEventListener("input", () => { state[key] = +control.value === start ? null : values[control.value]; save(); changed(); });
  }

  // What a slider says beside it and to screen readers.
  function tell(control, text) {
    one(`output[for="${control.id}"]`).textContent = text;
    control.setAttribute("aria-valuetext", text);
  }

  function addFigures(host, has) {
    data.runs.forEach((run, i) => {
      if (!has(run)) return;
      const image = element("img"), caption = element("figcaption");
      image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < image.clientWidth));
      host.append(element("figure", {}, image, caption));
      host.lastChild.dataset.run = i;
    });
  }

  function show(figure, src, alt, text) {
    const image = one("img", figure);
    figure.hidden = !isShown(+figure.dataset.run);
    if (image.getAttribute("src") !== src) image.src = src;
    image.alt = alt;
    one("figcaption", figure).textContent = text;
  }

  const slider = one("#preview-step"), previews = one("#previews");
  const steps = sorted(data.runs.flatMap((run) => run.previews.map((preview) => preview.step)));
  if (slider) {
    valueSlider(slider, steps, steps.length - 1, "previewStep", showPreviews);
    addFigures(previews, (run) => run.previews.length);
  }

  function showPreviews() {
    if (!slider) return;
    const step = steps[+slider.value];
    tell(slider, `${step}`);
    for (const figure of previews.children) {
      const run = data.runs[+figure.dataset.run];
      const [preview] = nearest(run.previews, (candidate) => Math.abs(candidate.step - step));
      show(figure, preview.src, `Preview of ${run.name} at step ${preview.step}`, `${run.name}, step ${preview.step}`);
    }
  }

  const timeSlider = one("#solver-step"), scaleSlider = one("#guidance-scale"), grids = one("#grids");
  const allGrids = data.runs.flatMap((run) => run.grids);
  const times = sorted(allGrids.map((grid) => grid.t));
  const scales = sorted(allGrids.map((grid) => grid.scale).filter((scale) => scale !== null));
  if (timeSlider) {
    valueSlider(timeSlider, times, times.length - 1, "solverTime", showGrids);
    valueSlider(scaleSlider, scales, Math.max(0, scales.indexOf(1)), "guidanceScale", showGrids);
    scaleSlider.closest("label").hidden = scales.length < 2;
    addFigures(grids, (run) => run.grids.length);
  }

  function showGrids() {
    if (!timeSlider) return;
    const t = times[+timeSlider.value], scale = scales[+scaleSlider.value], at = `t = ${+t.toFixed(3)}`;
    const totals = sorted(data.runs.filter((run) => run.grids.length).map((run) => run.trajectory.steps));
    tell(timeSlider, totals.length === 1 ? `${Math.round(t * totals[0])} of ${totals[0]}, ${at}` : at); // other numbers of steps meet at the same t
    tell(scaleSlider, `${scale}`);
    for (const figure of grids.children) {
      const { name, trajectory, grids: own } = data.runs[+figure.dataset.run];
      const guided = own.filter((grid) => grid.scale !== null);
      const [match] = guided.length ? nearest(guided, (grid) => Math.abs(grid.scale - scale)) : [{ scale: null }];
      const [grid] = nearest(own.filter((candidate) => candidate.scale === null || candidate.scale === match.scale), (candidate) => Math.abs(candidate.t - t));
      const guidance = match.scale === null ? "" : `, guidance scale ${match.scale}`;
      const text = `${name}, step ${grid.step} of ${trajectory.steps}, t = ${+grid.t.toFixed(3)}${guidance}`;
      const columns = trajectory.columns.length ? `; columns: ${trajectory.columns.join(", ")}` : "";
      show(figure, grid.src, `Grid of ${text}${columns}`, `${text} (${trajectory.weights}, ${trajectory.solver}, seed ${trajectory.seed})`);
    }
  }

  // ---- tables, copies, theme, reload

  function sort(table, column, direction) {
    const body = table.tBodies[0], header = table.tHead.rows[0].cells;
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    // whole numbers, with what may follow a blank: not dates, nor names that begin with a digit
    const number = (text) => (/^[-+]?[\d.,]+(e[-+]?\d+)?(?=$| )/i.test(text) ? parseFloat(text.replace(/,/g, "")) : NaN);
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (!x || !y) return !x - !y; // empty cells are last
      const order = Number.isNaN(number(x)) || Number.isNaN(number(y)) ? x.localeCompare(y, undefined, { numeric: true }) : number(x) - number(y);
      return direction === "ascending" ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
    for (const cell of header) cell.removeAttribute("aria-sort");
    header[column].setAttribute("aria-sort", direction);
  }
  for (const table of all("table.sortable")) {
    for (const button of all("th button", table)) button.addEventListener("click", () => {
      const cell = button.closest("th"), direction = cell.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      sort(table, cell.cellIndex, direction);
      state.sort[table.id] = [cell.cellIndex, direction];
      save();
    });
    const [column, direction] = state.sort[table.id] ?? [];
    if (table.tHead.rows[0].cells[column]) sort(table, column, direction);
  }

  for (const button of all(".copy")) button.addEventListener("click", async () => {
    const code = one("code", button.parentElement), text = code.textContent;
    let copied = true;
    try { await navigator.clipboard.writeText(text); } catch { // an old browser, or one that allows it to no file
      getSelection().selectAllChildren(code);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Press Ctrl-C";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themed = () => { drawCurves(); drawQuality(); };
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  one("#theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = state.theme = now === "dark" ? "light" : "dark";
    save();
    themed();
  });
  dark.addEventListener("change", themed);

  state.open ??= {};
  for (const details of all("#runs details")) {
    const name = data.runs[+details.dataset.run].name;
    details.open = state.open[name] ?? details.open;
    details.addEventListener("toggle", () => { state.open[name] = details.open; save(); });
  }
  for (const link of all('a[href^="#run-"]')) link.addEventListener("click", () => { one(link.getAttribute("href")).open = true; });
  const reload = one("#reload");
  if (reload) {
    keep(reload, () => {});
    setInterval(() => { if (reload.checked && !document.hidden) location.reload(); }, 1000 * reload.dataset.seconds);
  }

  keep(filter, update);
  update();
})();
