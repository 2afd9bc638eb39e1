// Charts. Names come from training scripts: every one is escaped before Plotly, which understands a little HTML, sees it.
"use strict";
const Charts = (() => {
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

  const colors = () => ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8"].map(style);

  // ---------------------------------------------------------------- one checkpoint
  const STAGES = ["reserve", "plan", "copy", "hand_over", "queued", "write", "fsync", "commit", "encode", "upload"];
  const KINDS = { unchanged: "--safe-bg", derived: "--k-derived", delta: "--k-delta", full: "--k-full", mixed: "--k-mixed" };
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
    const tail = Math.max(0, when.length - 400), steps = data.step.slice(tail).map((s, i) => `${s}${data.superseded[tail + i] ? " superseded" : ""}`);
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
  if (byId("waterfall")) start("waterfall", "detail.json", checkpoint);
  if (byId("held")) start("held", "storage.json", stored);
  return { byId, safe, style, number, draw, get, packed, colors };
})();
