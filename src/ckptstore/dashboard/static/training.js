// Training curves: values at checkpoints, the live curve between them, and what happened to the jobs.
"use strict";
(() => {
  const { byId, safe, style, number, draw, get, packed, colors } = Charts;
  const PACE = "steps_per_second";
  const smoothed = (values, weight) => {
    let last = null, debt = 1;
    return values.map((value) => {
      if (value === null || !Number.isFinite(value) || !weight) return value;
      last = last === null ? (1 - weight) * value : weight * last + (1 - weight) * value;
      debt *= weight;
      return last / (1 - debt);
    });
  };
  const axisOf = (data, axis) => (axis === "time" ? data.time.map((t) => new Date(t * 1000)) : data[axis]);
  const valuesOf = (data, metric) => ((metric === PACE ? data[PACE] : data.metrics[metric]) || []).map(number);
  const MARKS = [
    ["best", "star", "--safe", (d, i, m) => d.best[m] === d.save_id[i]],
    ["pinned", "diamond", "--warn", (d, i) => d.flags[i].includes("p")],
    ["emergency", "x", "--bad", (d, i) => d.flags[i].includes("e")],
    ["resumed from", "triangle-right", "--c2", (d, i) => d.flags[i].includes("r")],
    ["damaged", "circle-x-open", "--bad", (d, i) => d.flags[i].includes("d")],
  ];
  // Indexes of the live curve in pieces, one per job; a piece ends where a later one goes on from below it.
  const pieces = (data, raw) => {
    const found = [];
    for (let i = 0; i < raw.length; i += 1) {
      if (!i || data.step[i] <= data.step[i - 1]) found.push([]);
      if (raw[i] !== null) found.at(-1).push(i);
    }
    return found.filter((piece) => piece.length);
  };
  // What happened to the jobs, as lines through the chart. By epoch there is no place for them.
  const events = (data, live, axis) => {
    if (axis === "epoch") return [];
    const at = (e) => (axis === "time" ? new Date(e.time * 1000) : e.step);
    const line = (name, variable, dash) => (e, i) => ({
      type: "line", xref: "x", yref: "paper", x0: at(e), x1: at(e), y0: 0, y1: 1, line: { color: style(variable), width: 1.5, dash },
      name, legendgroup: name, showlegend: i === 0,
    });
    return [...data.resumes.slice(-60).map(line("resume", "--muted", "dot")), ...live.crashes.slice(-60).map(line("crash", "--bad", "dash"))];
  };
  const drawLive = (data, live, metric, { axis, weight, color, put, isOnly }) => {
    const raw = valuesOf(live, metric), x = axisOf(live, axis), parts = pieces(live, raw);
    let floor = Infinity;
    for (let n = parts.length - 1; n >= 0; n -= 1) {
      const left = parts[n].filter((i) => live.step[i] > floor), kept = parts[n].filter((i) => live.step[i] <= floor);
      floor = Math.min(floor, live.step[parts[n][0]]);
      if (left.length) put(left, x, left.map((i) => raw[i]), { mode: "lines", line: { color: style("--muted"), width: 1 }, opacity: 0.7, name: "lost work", legendgroup: "lost", showlegend: isOnly && n === parts.findIndex((p) => p.length), hoverinfo: "skip" });
      if (!kept.length) continue;
      const values = kept.map((i) => raw[i]);
      if (weight) put(kept, x, values, { mode: "lines", line: { color, width: 1 }, opacity: 0.3, showlegend: false, hoverinfo: "skip" });
      put(kept, x, smoothed(values, weight), { mode: "lines", name: `${isOnly ? "" : `${safe(data.run)} `}live`, legendgroup: `live ${data.run}`, showlegend: n === parts.length - 1, line: { color, width: 1.5 } });
    }
    return raw.filter((value) => value !== null).length;
  };
  const training = (all, lives) => {
    const metric = byId("metric").value, axis = byId("axis").value, weight = Number(byId("smooth").value);
    const showOld = byId("old").checked, several = all.length > 1, palette = colors(), traces = [], shapes = [], sentences = [];
    all.forEach((data, index) => {
      const live = lives[index], raw = valuesOf(data, metric), x = axisOf(data, axis), color = palette[index % palette.length];
      const at = (keep) => raw.map((_, i) => i).filter((i) => raw[i] !== null && keep(i));
      const line = at((i) => !data.flags[i].includes("s"));
      const tags = (i) => (data.tags[data.save_id[i]] || []).map((t) => `<br>${safe(t)}`).join("");
      const text = (i) => `<b>${safe(data.run)}</b> step ${data.step[i]}<br>${safe(metric)} ${raw[i]}${tags(i)}`;
      const put = (rows, where, values, more) => traces.push({ type: "scatter", x: rows.map((i) => where[i]), y: values, ...more });
      const mark = (rows, values, more) => put(rows, x, values, { text: rows.map(text), hoverinfo: "text", customdata: rows.map((i) => [index, data.save_id[i]]), ...more });
      const liveText = { hoverinfo: "x+y" };
      const numLive = drawLive(data, live, metric, { axis, weight, color, isOnly: !several, put: (rows, where, values, more) => put(rows, where, values, { ...liveText, ...more }) });
      const plain = line.map((i) => raw[i]);
      if (weight && !numLive) mark(line, plain, { mode: "lines", line: { color, width: 1 }, opacity: 0.3, showlegend: false, hoverinfo: "skip" });
      const mode = numLive ? "markers" : line.length > 400 ? "lines" : "lines+markers";
      if (line.length) mark(line, numLive ? plain : smoothed(plain, weight), { mode, name: several ? safe(data.run) : numLive ? "checkpoints" : safe(metric), line: { color, width: 2 }, marker: { size: numLive ? 6 : 5, color } });
      if (showOld) {
        const old = at((i) => data.flags[i].includes("s"));
        if (old.length) mark(old, old.map((i) => raw[i]), { mode: "markers", name: "superseded", marker: { color: style("--muted"), size: 6, symbol: "circle-open" } });
      }
      for (const [word, symbol, variable, test] of MARKS) {
        const rows = at((i) => test(data, i, metric)).filter((i) => showOld || word === "resumed from" || !data.flags[i].includes("s"));
        if (rows.length) mark(rows, rows.map((i) => raw[i]), { mode: "markers", name: word, legendgroup: word, showlegend: !several || index === 0, marker: { symbol, size: 12, color: style(variable), line: { width: 1, color: style("--card") } } });
      }
      if (!several) shapes.push(...events(data, live, axis));
      const last = line.at(-1), best = line.find((i) => data.best[metric] === data.save_id[i]);
      const happened = several ? "" : [[data.resumes.length, "resume"], [live.crashes.length, "crash"]].filter(([n]) => n).map(([n, word]) => ` ${n} ${word}${n === 1 ? "" : word === "crash" ? "es" : "s"}.`).join("");
      sentences.push((last === undefined ? numLive ? `${data.run}: ${numLive} live values of ${metric}, none at a checkpoint yet.` : `${data.run}: no value of ${metric}.`
        : `${data.run}: ${line.length} values of ${metric} at checkpoints${numLive ? `, ${numLive} between` : ""}, last ${raw[last].toPrecision(4)} at step ${data.step[last]}` + (best === undefined ? "." : `, best (${data.direction[metric]}) ${raw[best].toPrecision(4)} at step ${data.step[best]}.`)) + happened);
    });
    byId("curve-title").textContent = metric === PACE ? "Steps per second" : metric || "Metrics";
    byId("curve-words").textContent = sentences.join(" ");
    return draw("curve", traces, {
      shapes, showlegend: traces.length > 1 || shapes.length > 0, uirevision: `${metric} ${axis}`,
      xaxis: { title: { text: axis } }, yaxis: { title: { text: safe(metric) }, type: byId("log").checked ? "log" : "linear" },
    });
  };

  const history = ({ histories, trouble, save_id: id }) => {
    const words = byId("history-words");
    if (trouble) { words.textContent = `They can't be read: ${trouble}`; return; }
    if (!histories.length) { words.textContent = id ? "This checkpoint holds no lists of numbers, such as a loss history." : "No checkpoint yet."; return; }
    const shown = histories.slice(0, 6), palette = colors();
    words.textContent = `From the state itself, finer than one value per checkpoint: ${shown.map((h) => `${h.name} (${h.length})`).join(", ")}${histories.length > 6 ? `, and ${histories.length - 6} more` : ""}.`;
    const weight = Number(byId("smooth").value);
    draw("history", shown.map((one, index) => ({
      type: "scatter", mode: "lines", name: safe(one.name), x: one.x, y: smoothed(one.y.map(number), weight), line: { color: palette[index], width: 1.5 }, hoverinfo: "x+y", visible: index === 0 || one.axis === shown[0].axis ? true : "legendonly",
    })), { showlegend: true, xaxis: { title: { text: shown[0].axis } }, yaxis: { type: byId("log").checked ? "log" : "linear" } });
  };

  const startTraining = () => {
    let all = [], lives = [], lists = null;
    const chosen = () => [...(byId("with")?.selectedOptions || [])].map((o) => o.value);
    const redraw = () => { if (all.length) training(all, lives); if (lists) history(lists); };
    const fill = (names) => {
      const select = byId("metric"), have = new Set([...select.options].map((o) => o.value));
      for (const name of names) if (!have.has(name)) { const option = new Option(name, name); select.insertBefore(option, select.querySelector("[data-computed]")); if (select.options.length === 2) select.value = name; }
    };
    const load = async () => {
      try {
        const folders = ["", ...chosen().map((name) => `../${encodeURIComponent(name)}/`)];
        const [kept, ...answers] = await Promise.all([get("history.json"), ...folders.map((f) => get(`${f}series.json`)), ...folders.map((f) => get(`${f}live.json`))]);
        const isNew = answers.some((a) => a.isNew) || folders.length !== all.length;
        all = answers.slice(0, folders.length).map((a) => a.body);
        lives = answers.slice(folders.length).map((a) => a.body);
        fill([...Object.keys(all[0].metrics), ...Object.keys(lives[0].metrics)]);
        if (isNew) training(all, lives);
        if (kept.isNew) { lists = kept.body; history(lists); }
      } catch (error) { byId("curve-words").textContent = `Curves can't be loaded: ${error.message}`; }
    };
    byId("smooth").addEventListener("input", () => { byId("smooth-value").textContent = byId("smooth").value; redraw(); });
    for (const id of ["metric", "axis", "log", "old"]) byId(id).addEventListener("change", redraw);
    byId("with")?.addEventListener("change", () => {
      const url = new URL(location.href);
      url.searchParams.delete("with");
      chosen().forEach((name) => url.searchParams.append("with", name));
      window.history.replaceState(null, "", url);
      load();
    });
    byId("tools").addEventListener("submit", (event) => event.preventDefault());
    byId("zoom").addEventListener("click", () => Plotly.relayout("curve", { "xaxis.autorange": true, "yaxis.autorange": true }));
    byId("png").addEventListener("click", () => Plotly.downloadImage("curve", { format: "png", width: 1200, height: 600, filename: document.title.split(" ")[0].replace(/:$/, "") }));
    document.addEventListener("ckptstore:theme", redraw);
    document.addEventListener("ckptstore:changed", load);
    document.addEventListener("ckptstore:looked", load);  // the live curve grows between checkpoints
    load().then(() => !packed && byId("curve").on?.("plotly_click", ({ points }) => {
      const [index, id] = points[0].customdata || [];
      if (!id) return;
      location.href = `${index ? `../${encodeURIComponent(all[index].run)}/` : ""}checkpoint/${id}/`;
    }));
  };
  if (byId("curve")) startTraining();
})();
