// Charts. Names come from training scripts: every one is escaped before Plotly, which understands a little HTML, sees it.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value) => (value === null || value === undefined ? null : Number(String(value).replace("inf", "Infinity")));
  const bytes = (n) => {
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (Math.abs(n) < 1024) return `${unit === "B" || n >= 100 ? Math.round(n) : n.toFixed(1)} ${unit}`;
      n /= 1024;
    }
    return `${n.toFixed(1)} TiB`;
  };
  const seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : s < 120 ? `${s.toFixed(1)} s` : `${Math.round(s / 60)} min`);
  const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true, showTips: false };
  const layout = (extra) => {
    const axis = { gridcolor: style("--grid"), zerolinecolor: style("--grid"), linecolor: style("--line"), automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: "stay",
      font: { color: style("--text"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 8, r: 12, t: 8, b: 8 }, hovermode: "closest",
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { bgcolor: style("--card"), font: { color: style("--text") }, bordercolor: style("--line") },
      ...extra,
      xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
    };
  };
  const draw = (id, traces, extra) => { byId(id).hidden = false; return Plotly.react(id, traces, layout(extra), CONFIG); };

  // ---------------------------------------------------------------- data
  const cache = new Map();  // url -> {tag, body}
  const packed = byId("packed") && JSON.parse(byId("packed").textContent);  // a report brings its data along
  const get = async (url) => {
    if (packed) { const isNew = !cache.has(url); cache.set(url, {}); return { body: packed[url], isNew }; }
    const known = cache.get(url);
    const answer = await fetch(url, { cache: "no-store", headers: known?.tag ? { "If-None-Match": known.tag } : {} });
    if (answer.status === 304) return { body: known.body, isNew: false };
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error || `answer ${answer.status}`);
    cache.set(url, { tag: answer.headers.get("ETag"), body });
    return { body, isNew: true };
  };

  // ---------------------------------------------------------------- training
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
  const colors = () => ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"].map(style);
  const MARKS = [
    ["best", "star", "--safe", (d, i, m) => d.best[m] === d.save_id[i]],
    ["pinned", "diamond", "--warn", (d, i) => d.flags[i].includes("p")],
    ["emergency", "x", "--bad", (d, i) => d.flags[i].includes("e")],
    ["damaged", "circle-x-open", "--bad", (d, i) => d.flags[i].includes("d")],
  ];
  const training = (all) => {
    const metric = byId("metric").value, axis = byId("axis").value, weight = Number(byId("smooth").value);
    const isComputed = metric === "steps_per_second" && byId("metric").selectedOptions[0]?.dataset.computed !== undefined;
    const showOld = byId("old").checked, several = all.length > 1, palette = colors(), traces = [], shapes = [];
    const sentences = [];
    all.forEach((data, index) => {
      const raw = ((isComputed ? data.steps_per_second : data.metrics[metric]) || []).map(number);
      const x = axisOf(data, axis), color = palette[index % palette.length];
      const at = (keep) => raw.map((_, i) => i).filter((i) => raw[i] !== null && keep(i));
      const line = at((i) => !data.flags[i].includes("s"));
      const name = several ? safe(data.run) : "";
      const text = (i) => `<b>${safe(data.run)}</b> step ${data.step[i]}<br>${safe(metric)} ${raw[i]}${(data.tags[data.save_id[i]] || []).map((t) => `<br>${safe(t)}`).join("")}`;
      const put = (rows, values, more) => traces.push({
        type: "scatter", x: rows.map((i) => x[i]), y: values, text: rows.map(text), hoverinfo: "text", customdata: rows.map((i) => [index, data.save_id[i]]), ...more,
      });
      const plain = line.map((i) => raw[i]);
      const mode = line.length > 400 ? "lines" : "lines+markers";
      if (weight) put(line, plain, { mode: "lines", line: { color, width: 1 }, opacity: 0.3, showlegend: false, hoverinfo: "skip" });
      put(line, smoothed(plain, weight), { mode, name: name || safe(metric), line: { color, width: 2 }, marker: { size: 5 } });
      if (showOld) {
        const old = at((i) => data.flags[i].includes("s"));
        if (old.length) put(old, old.map((i) => raw[i]), { mode: "markers", name: "superseded", marker: { color: style("--muted"), size: 6, symbol: "circle-open" } });
      }
      for (const [word, symbol, variable, test] of MARKS) {
        const rows = line.filter((i) => test(data, i, metric));
        if (rows.length) put(rows, rows.map((i) => raw[i]), { mode: "markers", name: word, legendgroup: word, showlegend: !several || index === 0, marker: { symbol, size: 12, color: style(variable), line: { width: 1, color: style("--card") } } });
      }
      if (!several && axis !== "epoch") data.starts.slice(1).slice(-60).forEach((start) => shapes.push({
        type: "line", xref: "x", yref: "paper", x0: axis === "time" ? new Date(start.time * 1000) : start.step, x1: axis === "time" ? new Date(start.time * 1000) : start.step, y0: 0, y1: 1, line: { color: style("--muted"), width: 1, dash: "dot" },
      }));
      const last = line.at(-1);
      const best = line.find((i) => data.best[metric] === data.save_id[i]);
      sentences.push(last === undefined ? `${data.run}: no value of ${metric}.` : `${data.run}: ${line.length} values of ${metric}, last ${raw[last].toPrecision(4)} at step ${data.step[last]}` + (best === undefined ? "." : `, best (${data.direction[metric]}) ${raw[best].toPrecision(4)} at step ${data.step[best]}.`) + (!several && data.starts.length > 1 ? ` Dotted lines: ${data.starts.length - 1} resumes.` : ""));
    });
    byId("curve-title").textContent = `${isComputed ? "Steps per second between checkpoints" : metric} per checkpoint`;
    byId("curve-words").textContent = sentences.join(" ");
    return draw("curve", traces, {
      shapes, showlegend: traces.length > 1, uirevision: `${metric} ${axis}`,
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
    let all = [], lists = null;
    const chosen = () => [...(byId("with")?.selectedOptions || [])].map((o) => o.value);
    const redraw = () => { if (all.length) training(all); if (lists) history(lists); };
    const fill = (names) => {
      const select = byId("metric"), have = new Set([...select.options].map((o) => o.value));
      for (const name of names) if (!have.has(name)) { const option = new Option(name, name); select.insertBefore(option, select.querySelector("[data-computed]")); if (select.options.length === 2) select.value = name; }
    };
    const load = async () => {
      try {
        const urls = ["series.json", ...chosen().map((name) => `../${encodeURIComponent(name)}/series.json`)];
        const [kept, ...answers] = await Promise.all([get("history.json"), ...urls.map(get)]);
        const isNew = answers.some((a) => a.isNew) || answers.length !== all.length;
        all = answers.map((a) => a.body);
        fill(Object.keys(all[0].metrics));
        if (isNew) training(all);
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
    load().then(() => !packed && byId("curve").on?.("plotly_click", ({ points }) => {
      const [index, id] = points[0].customdata;
      location.href = `${index ? `../${encodeURIComponent(all[index].run)}/` : ""}checkpoint/${id}/`;
    }));
  };

  // ---------------------------------------------------------------- one checkpoint
  const STAGES = ["reserve", "plan", "copy", "write", "commit", "upload"];
  const KINDS = { unchanged: "--safe-bg", delta: "--k-delta", full: "--k-full", mixed: "--k-mixed" };
  const checkpoint = (data) => {
    const rows = [...new Set(data.bars.map((bar) => bar[0]))].reverse(), palette = colors();
    const stages = [...new Set(data.bars.map((bar) => bar[1]))].sort((a, b) => STAGES.indexOf(a) - STAGES.indexOf(b));
    if (!data.bars.length) byId("time-words").textContent = "No timing was noted for this checkpoint on this machine.";
    else {
      const staged = Math.max(...data.bars.filter((b) => b[0].startsWith("rank ")).map((b) => b[2] + b[3]), 0);
      const end = Math.max(...data.bars.map((b) => b[2] + b[3]));
      byId("time-words").textContent = `Training waited ${seconds(staged)}; everything together took ${seconds(end)}.`;
      byId("waterfall").style.height = `${Math.min(900, 110 + 30 * rows.length)}px`;
      draw("waterfall", stages.map((stage, index) => {
        const bars = data.bars.filter((bar) => bar[1] === stage);
        return { type: "bar", orientation: "h", name: safe(stage), y: bars.map((b) => safe(b[0])), base: bars.map((b) => b[2]), x: bars.map((b) => b[3]), text: bars.map((b) => `${safe(b[0])}: ${safe(stage)} ${seconds(b[3])}`), textposition: "none", hoverinfo: "text", marker: { color: palette[index % palette.length] } };
      }), { barmode: "overlay", showlegend: true, bargap: 0.35, xaxis: { title: { text: "seconds" }, rangemode: "tozero" }, yaxis: { type: "category", categoryorder: "array", categoryarray: rows.map(safe) } });
    }
    const words = byId("map-words");
    if (!data.treemap) { words.textContent = `The manifests can't be read: ${data.trouble}`; return; }
    const summary = Object.entries(data.kinds).filter(([kind]) => kind !== "unknown").map(([kind, [n, size]]) => `${n} ${kind} (${bytes(size)})`).join(", ");
    words.textContent = `${data.num_tensors} tensors. ` + (summary ? `On the remote: ${summary}.` : data.trouble ? `How they were sent can't be told: ${data.trouble}` : "Not on a remote, so nothing was sent yet.");
    const t = data.treemap;
    draw("treemap", [{
      type: "treemap", ids: t.id, parents: t.parent, labels: t.label.map(safe), values: t.value, branchvalues: "total", sort: true, maxdepth: 6, tiling: { pad: 1 },
      text: t.value.map((v, i) => `${bytes(v)}${t.kind[i] && t.kind[i] !== "stored" ? `, ${t.kind[i]}` : ""}`), textinfo: "label+text", hoverinfo: "label+text",
      marker: { colors: t.kind.map((kind) => style(KINDS[kind] || "--bg")), line: { width: 1, color: style("--card") } }, textfont: { color: style("--text") }, root: { color: style("--bg") }, pathbar: { visible: true },
    }], { margin: { l: 0, r: 0, t: 4, b: 0 } });
    byId("largest").hidden = false;
    byId("largest-rows").replaceChildren(...data.largest.map((row) => {
      const tr = document.createElement("tr");
      [row[0], row[1], row[2], bytes(row[3]), row[4] || "–"].forEach((value, i) => { const cell = document.createElement("td"); if (i === 3) cell.className = "num"; cell.textContent = value; tr.append(cell); });
      return tr;
    }));
  };

  // ---------------------------------------------------------------- storage
  const stored = (data) => {
    const when = data.time.map((t) => new Date(t * 1000)), palette = colors();
    const names = Object.keys(data.held);
    const traces = names.map((name, index) => ({ type: "scatter", mode: "lines", line: { shape: "hv", color: palette[index], width: 2 }, name: `${safe(name)}, as loaded`, x: when, y: data.held[name], text: data.held[name].map(bytes), hoverinfo: "text+x" }));
    if (data.stored.length) traces.push({ type: "scatter", mode: "lines", line: { shape: "hv", color: palette[5], width: 2, dash: "dash" }, name: "uploaded", x: when, y: data.stored, text: data.stored.map(bytes), hoverinfo: "text+x" });
    byId("held-words").textContent = when.length ? `${when.length} checkpoints; ` + names.map((name) => `${name} holds ${bytes(data.held[name].at(-1))} as loaded`).join(", ") + (data.stored.length ? `; uploaded ${bytes(data.stored.at(-1))}.` : ".") : "No checkpoint yet.";
    // Binary units on the axis as everywhere else: values are shown in the unit of the largest.
    const scale = (largest) => { let unit = 1, at = 0; while (largest / unit >= 1024 && at < 4) { unit *= 1024; at += 1; } return [unit, ["B", "KiB", "MiB", "GiB", "TiB"][at]]; };
    const divided = (values, unit) => values.map((v) => (v === null ? null : v / unit));
    const [unit, word] = scale(Math.max(0, ...traces.map((t) => t.y.at(-1) || 0)));
    traces.forEach((trace) => { trace.y = divided(trace.y, unit); });
    draw("held", traces, { showlegend: true, yaxis: { rangemode: "tozero", title: { text: word } } });
    const tail = Math.max(0, when.length - 400), steps = data.step.slice(tail).map((s, i) => `${s}`);
    const [one, oneWord] = scale(data.each_plain.slice(tail).reduce((a, b) => Math.max(a, b), 0));
    const bar = (values, name, color) => ({ type: "bar", name, x: steps, y: divided(values.slice(tail), one), text: values.slice(tail).map((v) => (v === null ? "" : bytes(v))), textposition: "none", hoverinfo: "x+text", marker: { color } });
    draw("each", [bar(data.each_plain, "as loaded", palette[0]), bar(data.each_stored, "uploaded", palette[5])], { barmode: "group", showlegend: true, xaxis: { title: { text: "step" }, type: "category", nticks: 12 }, yaxis: { rangemode: "tozero", title: { text: oneWord } } });
  };

  const start = (id, url, render) => {
    let last = null;
    const load = async () => {
      try { const { body, isNew } = await get(url); if (isNew) { last = body; render(body); } }
      catch (error) { const words = document.querySelector("[id$=-words]"); if (words) words.textContent = `This can't be loaded: ${error.message}`; }
    };
    document.addEventListener("ckptstore:theme", () => last && render(last));
    document.addEventListener("ckptstore:changed", load);
    load();
  };
  if (byId("curve")) startTraining();
  if (byId("waterfall")) start("waterfall", "detail.json", checkpoint);
  if (byId("held")) start("held", "storage.json", stored);
})();
