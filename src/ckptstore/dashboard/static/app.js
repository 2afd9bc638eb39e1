// Keeps the page true: polls for its parts, puts in place what differs, and ticks ages. No page needs it to be read.
"use strict";
(() => {
  const POLL_MS = 2000;
  const byId = (id) => document.getElementById(id);

  // ---------------------------------------------------------------- ages
  const span = (s) => {
    if (s < 120) return `${Math.max(0, Math.floor(s))} s`;
    if (s < 7200) return `${Math.floor(s / 60)} min`;
    if (s < 172800) return `${Math.floor(s / 3600)} h`;
    return `${Math.floor(s / 86400)} d`;
  };
  const tick = (root = document) => {
    for (const time of root.querySelectorAll("time[data-age], time[data-span]")) {
      const seconds = (Date.now() - Date.parse(time.dateTime)) / 1000;
      const text = span(seconds) + ("age" in time.dataset ? " ago" : "");
      if (time.textContent !== text) time.textContent = text;
    }
  };
  tick();
  setInterval(tick, 1000);

  // ---------------------------------------------------------------- live parts
  // Puts `next` in place of `old`: keyed children are kept where they are equal, so that focus, selection and scroll stay.
  const isSame = (a, b) => a.isEqualNode(b);
  const forget = (node) => { for (const time of node.querySelectorAll("time")) time.textContent = ""; return node; };
  const morph = (old, next) => {
    if (isSame(forget(old.cloneNode(true)), forget(next.cloneNode(true)))) return;
    const isSplit = old.tagName === next.tagName && [...next.children].some((c) => c.dataset.key !== undefined);
    const isWrapper = old.tagName === next.tagName && next.querySelector("[data-key]") && next.childElementCount === old.childElementCount &&
      [...next.children].every((c, i) => c.tagName === old.children[i].tagName);
    if (!isSplit && !isWrapper) {
      const focused = old.contains(document.activeElement) ? document.activeElement : null;
      const label = focused && (focused.getAttribute("aria-label") || focused.textContent);
      old.replaceWith(next);
      if (focused) [...next.querySelectorAll("a,button")].find((e) => (e.getAttribute("aria-label") || e.textContent) === label)?.focus();
      return;
    }
    for (const { name, value } of next.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    for (const { name } of [...old.attributes]) if (!next.hasAttribute(name)) old.removeAttribute(name);
    if (!isSplit) { [...old.children].forEach((child, i) => morph(child, next.children[i])); return; }
    const known = new Map([...old.children].map((c) => [c.dataset.key ?? c.outerHTML, c]));
    let place = old.firstElementChild;
    for (const child of [...next.children]) {
      const twin = known.get(child.dataset.key ?? child.outerHTML);
      if (twin && twin.tagName === child.tagName) {
        known.delete(child.dataset.key ?? child.outerHTML);
        if (twin === place) place = place.nextElementSibling; else old.insertBefore(twin, place);
        morph(twin, child);
      } else {
        old.insertBefore(child, place);
      }
    }
    for (const gone of known.values()) gone.remove();
  };

  const live = [...document.querySelectorAll("[data-live]")];
  const state = byId("live"), words = byId("live-text");
  const say = (kind, text) => {
    if (state.dataset.state !== kind) state.dataset.state = kind;
    if (words.textContent !== text) words.textContent = text;
  };
  let tag = "", failures = 0;
  const poll = async () => {
    const url = new URL(location.href);
    url.searchParams.set("live", "1");
    url.hash = "";
    try {
      const answer = await fetch(url, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        const body = await answer.json();
        tag = answer.headers.get("ETag") || "";
        for (const part of live) {
          const html = body.regions[part.id];
          if (html === undefined) continue;
          const next = part.cloneNode(false);
          next.innerHTML = html;  // rendered and escaped by the server, which is the same that made the page
          tick(next);
          morph(part, next);
        }
        document.dispatchEvent(new CustomEvent("ckptstore:changed"));
      } else if (answer.status !== 304) {
        const body = await answer.json().catch(() => ({}));
        throw new Error(body.error || `answer ${answer.status}`);
      }
      if (answer.status === 304) document.dispatchEvent(new CustomEvent("ckptstore:looked"));
      failures = 0;
      say("ok", "live");
    } catch (error) {
      failures += 1;
      say("lost", failures < 2 ? "reconnecting…" : `not live: ${error.message === "Failed to fetch" ? "the dashboard does not answer" : error.message}`);
    }
  };
  const loop = async () => {
    if (!document.hidden) await poll();
    setTimeout(loop, Math.min(POLL_MS * 2 ** Math.min(failures, 4), 30000));
  };
  if (live.length) setTimeout(loop, POLL_MS);
  else if (state) state.hidden = true;
  document.addEventListener("visibilitychange", () => { if (!document.hidden && live.length) poll(); });

  // ---------------------------------------------------------------- buttons
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const text = button.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      const range = document.createRange();
      range.selectNodeContents(button.previousElementSibling);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    try { localStorage.setItem("ckptstore-theme", root.dataset.theme); } catch { /* not kept, then */ }
    document.dispatchEvent(new CustomEvent("ckptstore:theme"));
  });
})();
