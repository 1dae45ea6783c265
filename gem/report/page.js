"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const PAGE = 20; // prompts at a time
  const CHUNK = 500; // tokens of one block: what is off the screen is plain text, and is not laid out
  const HEAD = 320, TAIL = 80; // tokens shown of a long completion before it is opened

  /** An element with properties and children; text only ever goes in as text. */
  function make(name, properties = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in element) element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  function number(value, sign = false) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    let text = size < 1e-4 ? value.toExponential(2) : value.toPrecision(3);
    if (Number.isInteger(value)) text = String(value);
    else if (size >= 0.01 && size < 100) text = value.toFixed(3);
    else if (size >= 100 && size < 1e5) text = value.toFixed(1);
    return (sign && value > 0 ? "+" : "") + text.replaceAll("-", "−");
  }

  // ---------------------------------------------------------------- theme, navigation

  const themes = ["auto", "light", "dark"];
  function setTheme(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").querySelector("b").textContent = theme;
  }
  let theme = "auto";
  try { theme = localStorage.getItem("gem-theme") || "auto"; } catch { /* a page from a file may have no storage */ }
  if (!themes.includes(theme)) theme = "auto";
  setTheme(theme);
  byId("theme").hidden = false;
  byId("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
    try { localStorage.setItem("gem-theme", theme); } catch { /* as above */ }
  });

  const links = [...document.querySelectorAll("nav .links a")];
  const sections = links.map((link) => document.querySelector(link.getAttribute("href")));
  let waiting = false;
  function markSection() {
    waiting = false;
    const passed = sections.filter((section) => section.getBoundingClientRect().top < 160 || section.id === "overview");
    const here = passed.reduce((a, b) => (a && a.getBoundingClientRect().top > b.getBoundingClientRect().top ? a : b), null);
    links.forEach((link, i) => {
      if (sections[i] !== here) return link.removeAttribute("aria-current");
      if (link.hasAttribute("aria-current")) return;
      link.setAttribute("aria-current", "true");
      link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft - 40; // a narrow screen shows few
    });
  }
  addEventListener("scroll", () => { if (!waiting) { waiting = true; requestAnimationFrame(markSection); } }, { passive: true });
  markSection();

  // ---------------------------------------------------------------- charts: a read-out of the nearest step

  data.charts.forEach((chart, k) => {
    const box = byId(`chart-${k}`), plot = box.querySelector(".plot"), cursor = box.querySelector(".cursor");
    const svg = plot.querySelector("svg"), now = [...box.querySelectorAll(".now")], at = box.querySelector(".at");
    const last = chart.points.length - 1;
    let place = last;
    function read(i, pointed) {
      place = i;
      const point = chart.points[i];
      now.forEach((cell, s) => { cell.textContent = point.values[s]; });
      at.replaceChildren(point.at, ...point.guards.map((words) => make("b", {}, ` ▼ ${words}`)));
      cursor.setAttribute("x1", point.x);
      cursor.setAttribute("x2", point.x);
      plot.classList.toggle("reading", pointed);
      plot.setAttribute("aria-valuenow", i);
      const words = chart.names.map((name, s) => `${name} ${point.values[s]}`);
      plot.setAttribute("aria-valuetext", [point.at, ...words, ...point.guards].join(", "));
    }
    read(last, false);
    plot.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const x = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
      let low = 0, high = last;
      while (low < high) {
        const middle = (low + high) >> 1;
        if ((chart.points[middle].x + chart.points[middle + 1].x) / 2 < x) low = middle + 1;
        else high = middle;
      }
      read(low, true);
    });
    plot.addEventListener("pointerleave", () => read(last, false));
    plot.addEventListener("blur", () => read(last, false));
    plot.addEventListener("focus", () => read(place, plot.matches(":focus-visible")));
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: place + 1, ArrowUp: place + 1, ArrowLeft: place - 1, ArrowDown: place - 1, Home: 0, End: last, PageUp: place + 10, PageDown: place - 10 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      read(Math.min(last, Math.max(0, moves[event.key])), true);
    });
  });

  if (!byId("completions")) return;

  // ---------------------------------------------------------------- tokens

  const tip = byId("tip");
  const level = (value) => value === null ? 0 : data.levels.filter((from) => value >= from).length;
  let colour = "entropy";
  const lists = new Map(); // .text element -> TokenList
  const sight = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) entry.target.fill();
  }, { rootMargin: "600px" });

  /** The tokens of a completion: blocks of plain text, cut into elements when they come near the screen. */
  class TokenList {
    constructor(id, name) {
      this.numbers = JSON.parse(byId(`tokens-${id}`).textContent);
      const text = data.completions[id].text;
      let from = 0;
      this.pieces = this.numbers.lengths.map((length) => text.slice(from, from += length));
      this.forks = new Set(this.numbers.fork);
      this.at = 0;
      this.element = make("div", { className: "text", role: "group", tabIndex: 0, dir: "auto" });
      this.element.setAttribute("aria-label", `Tokens of ${name}`);
      lists.set(this.element, this);
      this.element.addEventListener("keydown", (event) => this.key(event));
      this.element.addEventListener("focus", () => this.focus(this.at));
      const count = this.pieces.length;
      this.long = count > HEAD + TAIL + 100;
      this.show(this.long ? [[0, HEAD], [count - TAIL, count]] : [[0, count]]);
    }

    show(ranges) {
      this.chunks = [];
      const parts = [];
      for (const [from, to] of ranges) {
        if (parts.length) parts.push(this.opener(from - this.chunks.at(-1).to));
        for (let start = from; start < to;) {
          let end = Math.min(start + CHUNK, to);
          for (let i = end; i < to && i > start + CHUNK / 2; i--) {
            if (this.pieces[i - 1].endsWith("\n")) { end = i; break; } // where the line ends anyway
          }
          parts.push(this.chunk(start, end));
          start = end;
        }
      }
      this.element.classList.toggle("only", this.chunks.length < 3);
      this.element.replaceChildren(...parts);
      this.element.tabIndex = 0;
    }

    chunk(from, to) {
      const element = make("div", { className: "chunk" }, this.pieces.slice(from, to).join(""));
      const chunk = { from, to, element, filled: false };
      element.fill = () => this.fill(chunk);
      this.chunks.push(chunk);
      sight.observe(element);
      return element;
    }

    opener(hidden) {
      const button = make("button", { type: "button", className: "gap" }, `Show ${hidden.toLocaleString("en")} more tokens`);
      button.addEventListener("click", () => {
        this.show([[0, this.pieces.length]]);
        this.element.closest(".card").classList.add("large");
        this.focus(HEAD);
      });
      return button;
    }

    fill(chunk) {
      if (chunk.filled) return;
      chunk.filled = true;
      sight.unobserve(chunk.element);
      const answer = Math.max(chunk.from, Math.min(this.numbers.answer, chunk.to));
      const before = [], within = [];
      for (let i = chunk.from; i < chunk.to; i++) {
        const token = make("span", { textContent: this.pieces[i], className: this.kind(i), tabIndex: -1 });
        token.i = i;
        (i < answer ? before : within).push(token);
      }
      chunk.element.replaceChildren(...before);
      if (within.length) chunk.element.append(make("span", { className: "answer" }, ...within));
      highlightSoon();
    }

    kind(i) {
      const value = colour === "entropy" ? this.numbers.entropy[i] : this.numbers.logprob[i] === null ? null : -this.numbers.logprob[i];
      return `t e${level(value)}${this.forks.has(i) ? " fork" : ""}${this.pieces[i].startsWith("\n") ? " nl" : ""}`;
    }

    recolour() {
      for (const token of this.element.querySelectorAll(".t")) token.className = this.kind(token.i);
    }

    token(i) {
      const chunk = this.chunks.find((c) => c.from <= i && i < c.to);
      if (!chunk) return null;
      this.fill(chunk);
      const answer = chunk.element.querySelector(".answer");
      const before = Math.max(0, Math.min(this.numbers.answer, chunk.to) - chunk.from);
      return i - chunk.from < before ? chunk.element.children[i - chunk.from] : answer.children[i - chunk.from - before];
    }

    focus(i) {
      const token = this.token(i);
      if (!token) return;
      for (const old of this.element.querySelectorAll(".t[tabindex='0']")) { old.tabIndex = -1; old.removeAttribute("aria-describedby"); }
      this.at = i;
      this.element.tabIndex = -1;
      token.tabIndex = 0;
      token.setAttribute("aria-describedby", "tip");
      token.focus();
    }

    /** The nearest token on the line above or below. */
    line(direction) {
      const here = this.token(this.at).getClientRects()[0];
      let best = null, row = null;
      for (let i = this.at + direction, looked = 0; looked < 400; i += direction, looked++) {
        i = this.visible(i, direction);
        const token = this.token(i);
        if (!token) break;
        const frame = token.getClientRects()[0];
        if (!frame || Math.abs(frame.top - here.top) < here.height / 2) continue;
        if (row === null) row = frame.top;
        else if (Math.abs(frame.top - row) > here.height / 2) break;
        const far = Math.abs(frame.left - here.left);
        if (best === null || far < best.far) best = { i, far };
      }
      return best ? best.i : this.at;
    }

    /** i, or the token behind the hidden ones. */
    visible(i, direction) {
      if (this.chunks.some((c) => c.from <= i && i < c.to)) return i;
      const beyond = this.chunks.filter((c) => direction > 0 ? c.from > i : c.to <= i);
      return beyond.length ? (direction > 0 ? beyond[0].from : beyond.at(-1).to - 1) : this.at;
    }

    key(event) {
      if (event.target === this.element || !event.target.classList.contains("t") || event.ctrlKey || event.metaKey || event.altKey) return;
      const last = this.pieces.length - 1, step = (by) => this.visible(Math.min(last, Math.max(0, this.at + by)), Math.sign(by));
      const moves = {
        ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => this.line(1), ArrowUp: () => this.line(-1),
        PageDown: () => step(50), PageUp: () => step(-50), Home: () => 0, End: () => last,
        f: () => this.numbers.fork.find((i) => i > this.at && this.token(i)) ?? this.numbers.fork.find((i) => this.token(i)) ?? this.at,
        a: () => this.numbers.answer <= last ? this.visible(this.numbers.answer, 1) : this.at,
      };
      const move = moves[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!move) return;
      event.preventDefault();
      this.focus(move());
    }
  }

  const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(empty)";

  function showTip(token) {
    const list = lists.get(token.closest(".text")), i = token.i, numbers = list.numbers;
    const logprob = numbers.logprob[i], top = numbers.top ? numbers.top[i] : [];
    const row = (name, value) => make("tr", {}, make("td", {}, name), make("td", { className: "n" }, value));
    const rows = [
      row("entropy", `${number(numbers.entropy[i])} nats`),
      row("log-prob", `${number(logprob)} nats`),
      row("probability", logprob === null ? "–" : number(Math.exp(logprob))),
    ];
    const rank = top.findIndex(([text]) => text === list.pieces[i]);
    if (top.length) rows.push(row("rank", rank < 0 ? `below ${top.length}` : `${rank + 1}`));
    const alternatives = top.map(([text, value], k) => {
      const share = value === null ? 0 : Math.exp(value);
      const meter = make("meter", { min: 0, max: 1, value: share });
      return make("tr", { className: `${k === rank ? "drawn" : ""}${k ? "" : " rule"}` },
        make("td", {}, make("code", {}, shown(text))), make("td", { className: "n" }, number(share)), make("td", { className: "share" }, meter));
    });
    const marks = [`token ${(i + 1).toLocaleString("en")} of ${list.pieces.length.toLocaleString("en")}`];
    if (list.forks.has(i)) marks.push("fork");
    if (i >= numbers.answer) marks.push("answer");
    tip.replaceChildren(make("code", {}, shown(list.pieces[i])), make("span", { className: "where" }, marks.join(", ")),
      make("table", { role: "presentation" }, ...rows), ...(alternatives.length ? [make("table", { role: "presentation" }, ...alternatives)] : []));
    tip.hidden = false;
    const frame = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const below = frame.bottom + 10 + size.height < innerHeight;
    tip.style.left = `${Math.max(8, Math.min(frame.left, innerWidth - size.width - 8))}px`;
    tip.style.top = `${below ? frame.bottom + 8 : Math.max(8, frame.top - size.height - 8)}px`;
  }

  const groups = byId("groups");
  const tokenOf = (event) => event.target.closest?.("#groups .t");
  const focused = () => document.activeElement?.matches("#groups .t") ? document.activeElement : null;
  groups.addEventListener("pointerover", (event) => {
    const token = tokenOf(event) ?? focused();
    if (token) showTip(token); else tip.hidden = true;
  });
  groups.addEventListener("pointerleave", () => { if (focused()) showTip(focused()); else tip.hidden = true; });
  groups.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) showTip(token); });
  groups.addEventListener("focusout", () => { tip.hidden = true; });
  groups.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token && getSelection().isCollapsed) lists.get(token.closest(".text")).focus(token.i);
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  addEventListener("scroll", () => { const token = focused(); if (token && !tip.hidden) showTip(token); else tip.hidden = true; }, { passive: true });

  // ---------------------------------------------------------------- cards

  const verdict = (one) => one.correct === undefined ? "unknown" : one.correct ? "right" : "wrong";
  const SAID = { right: "✓ right", wrong: "✗ wrong", unknown: "? not known" };
  const anyKnown = data.completions.some((one) => one.correct !== undefined);

  function figures(one, best) {
    const list = make("dl", { className: "figures" });
    const add = (name, value, kind = "") => list.append(make("div", { className: kind }, make("dt", {}, name), make("dd", {}, value)));
    if (one.score !== undefined) add("score", number(one.score), "first");
    if (best) list.lastChild.lastChild.append(make("span", { className: "star", title: "the highest score of its prompt" }, " ★", make("span", { className: "unseen" }, " highest of its prompt")));
    if (one.probability !== undefined) add("P(right)", number(one.probability));
    if (one.advantage !== undefined) add("advantage", number(one.advantage, true));
    if (one.length !== undefined) add("tokens", one.length.toLocaleString("en"));
    if (one.meanEntropy !== undefined) add("mean entropy", number(one.meanEntropy));
    return list;
  }

  function plainText(text) {
    const element = make("div", { className: "text", dir: "auto" });
    const most = 3000;
    element.textContent = text.length > most + 500 ? text.slice(0, most) : text;
    if (text.length <= most + 500) return [element];
    const button = make("button", { type: "button", className: "gap" }, `Show ${(text.length - most).toLocaleString("en")} more characters`);
    button.addEventListener("click", () => { element.textContent = text; button.remove(); });
    return [element, button];
  }

  function card(id, best, place) {
    const one = data.completions[id], kind = verdict(one);
    const name = /^\d/.test(one.label) ? `Candidate ${one.label}` : one.label;
    const head = make("header", {}, make("h4", {}, name));
    if (anyKnown) head.append(make("span", { className: `is ${kind}` }, SAID[kind]));
    if (one.valid === false) head.append(make("span", { className: "is plain" }, "not counted"));
    if (one.truncated) head.append(make("span", { className: "is plain" }, "cut off"));
    const made = make("article", { className: "card" }, head, figures(one, best));
    made.setAttribute("aria-label", `${name}, ${place}`);
    made.append(...(one.tokens ? [new TokenList(id, `${name}, ${place}`).element] : plainText(one.text)));
    if (one.answer !== undefined) made.append(make("p", { className: "final" }, make("span", {}, "Answer "), one.answer));
    if (one.features.length) {
      const list = make("dl", { className: "features" }, ...one.features.map(([key, value]) => make("div", {}, make("dt", {}, key), make("dd", {}, number(value)))));
      made.append(make("details", { open: byId("features").checked, className: "all-features" }, make("summary", {}, `Features (${one.features.length})`), list));
    }
    return made;
  }

  function groupElement({ group, index, members }) {
    const where = group.stage ? `${group.stage} step ${group.step}` : group.step !== null ? `step ${group.step}` : "";
    const place = [where, `prompt ${index + 1}`].filter(Boolean).join(", ");
    const all = group.candidates, left = all.length - members.length;
    const scores = all.map((id) => data.completions[id].valid === false ? null : data.completions[id].score ?? null);
    const highest = scores.filter((s) => s !== null).length > 1 ? Math.max(...scores.filter((s) => s !== null)) : null;
    const best = highest === null ? -1 : all[scores.indexOf(highest)];
    const title = `${place[0].toUpperCase()}${place.slice(1)}${left ? ` · ${left} of ${all.length} candidates hidden by the filter` : ""}`;
    const made = make("section", { className: "group" }, make("h3", {}, title), make("p", { className: "prompt", dir: "auto" }, group.prompt));
    made.setAttribute("aria-label", place);
    if (group.whole) made.append(make("details", { className: "whole" }, make("summary", {}, "Whole prompt"), make("pre", { dir: "auto" }, group.whole)));
    made.append(make("div", { className: "cards" }, ...members.map((id) => card(id, id === best, place))));
    return made;
  }

  // ---------------------------------------------------------------- filter, sort, search

  const SORTS = { score: "score", probability: "P(right)", correct: "right or wrong", advantage: "advantage", length: "length", meanEntropy: "mean entropy" };
  const featureNames = [...new Set(data.completions.flatMap((one) => one.features.map(([name]) => name)))];
  const value = (one, key) => {
    if (key.startsWith("feature:")) return one.features.find(([name]) => `feature:${name}` === key)?.[1] ?? null;
    const found = key === "length" ? one.length ?? one.text.length : one[key];
    return found === undefined ? null : Number(found);
  };
  const option = (select, of, text) => byId(select).append(make("option", { value: of }, text));
  for (const [key, name] of Object.entries(SORTS)) if (data.completions.some((one) => value(one, key) !== null)) option("sort", key, name);
  for (const name of featureNames) option("sort", `feature:${name}`, name);
  const distinct = (key) => [...new Set(data.groups.map((group) => group[key]).filter((x) => x !== null))];
  for (const stage of distinct("stage")) option("stage", stage, stage);
  for (const step of distinct("step").sort((a, b) => a - b)) option("step", step, step);
  const hideUnless = (id, kept) => { byId(id).closest("label").hidden = !kept; };
  hideUnless("correct", anyKnown);
  hideUnless("stage", distinct("stage").length > 1);
  hideUnless("step", distinct("step").length > 1);
  hideUnless("features", featureNames.length > 0);
  hideUnless("colour", data.completions.some((one) => one.tokens));
  document.querySelector(".legend").hidden = !data.completions.some((one) => one.tokens);
  for (const one of data.completions) one.lower = one.text.toLowerCase();
  for (const group of data.groups) group.lower = group.prompt.toLowerCase();

  let found = [], shownGroups = 0;
  function select() {
    const query = byId("query").value.trim().toLowerCase(), correct = byId("correct").value;
    const stage = byId("stage").value, step = byId("step").value, key = byId("sort").value, order = Number(byId("order").value);
    const fits = (id, group) => {
      const one = data.completions[id];
      if (correct && String(one.correct ?? null) !== correct) return false;
      return !query || group.lower.includes(query) || one.lower.includes(query);
    };
    const compare = (a, b) => a === b ? 0 : a === null ? 1 : b === null ? -1 : order * (a - b);
    found = [];
    data.groups.forEach((group, index) => {
      if ((stage && group.stage !== stage) || (step && String(group.step) !== step)) return;
      const members = group.candidates.filter((id) => fits(id, group));
      if (key) members.sort((a, b) => compare(value(data.completions[a], key), value(data.completions[b], key)));
      if (members.length) found.push({ group, index, members });
    });
    if (key) found.sort((a, b) => compare(value(data.completions[a.members[0]], key), value(data.completions[b.members[0]], key)));
    byId("order").disabled = !key;
    const many = found.reduce((sum, one) => sum + one.members.length, 0);
    byId("count").textContent = `${many.toLocaleString("en")} of ${data.completions.length.toLocaleString("en")} completions, ${found.length.toLocaleString("en")} of ${data.groups.length.toLocaleString("en")} prompts`;
    sight.disconnect();
    lists.clear();
    tip.hidden = true;
    groups.replaceChildren();
    shownGroups = 0;
    showMore();
  }

  function showMore() {
    const next = found.slice(shownGroups, shownGroups + PAGE).map(groupElement);
    shownGroups += next.length;
    groups.append(...next);
    byId("more").hidden = shownGroups >= found.length;
    byId("more").textContent = `Show ${Math.min(PAGE, found.length - shownGroups)} more prompts (${(found.length - shownGroups).toLocaleString("en")} left)`;
    highlightSoon();
    return next[0];
  }

  byId("more").addEventListener("click", () => {
    const first = showMore();
    first.tabIndex = -1;
    first.focus({ preventScroll: true });
  });
  let typing = 0;
  byId("query").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(select, 120); });
  for (const id of ["correct", "stage", "step", "sort", "order"]) byId(id).addEventListener("change", select);
  byId("features").addEventListener("change", () => { for (const details of document.querySelectorAll(".all-features")) details.open = byId("features").checked; });
  byId("colour").addEventListener("change", () => {
    colour = byId("colour").value;
    byId("legend-name").textContent = colour === "entropy" ? "Entropy" : "−log-prob";
    for (const list of lists.values()) list.recolour();
  });
  document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());

  /** Marks what was searched for, across the borders of tokens; a browser without CSS highlights marks nothing. */
  let highlighting = 0;
  function highlightSoon() {
    clearTimeout(highlighting);
    highlighting = setTimeout(highlight, 60);
  }
  function highlight() {
    if (!("highlights" in CSS)) return;
    CSS.highlights.delete("found");
    const query = byId("query").value.trim().toLowerCase();
    if (!query) return;
    const ranges = [];
    for (const element of groups.querySelectorAll(".prompt, .chunk, .text:not([role])")) {
      const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), nodes = [], starts = [];
      let text = "";
      while (walker.nextNode()) { nodes.push(walker.currentNode); starts.push(text.length); text += walker.currentNode.data; }
      const lower = text.toLowerCase();
      if (lower.length !== text.length) continue; // lower case of another length: places would be wrong
      const find = (offset) => {
        let low = 0, high = starts.length - 1;
        while (low < high) { const middle = (low + high + 1) >> 1; if (starts[middle] <= offset) low = middle; else high = middle - 1; }
        return [nodes[low], offset - starts[low]];
      };
      for (let at = lower.indexOf(query); at >= 0 && ranges.length < 2000; at = lower.indexOf(query, at + query.length)) {
        const range = new Range(), [last, end] = find(at + query.length - 1);
        range.setStart(...find(at));
        range.setEnd(last, end + 1);
        ranges.push(range);
      }
    }
    if (ranges.length) CSS.highlights.set("found", new Highlight(...ranges));
  }

  addEventListener("beforeprint", () => { for (const list of lists.values()) for (const chunk of list.chunks) list.fill(chunk); });
  if (data.leftOut) {
    byId("left-out").hidden = false;
    byId("left-out").textContent = `The tokens of ${data.leftOut.toLocaleString("en")} completions are left out, for the page would be too large; their text is here.`;
  }
  select();
})();
