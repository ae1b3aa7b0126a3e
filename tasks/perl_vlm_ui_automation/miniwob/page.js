// Runs in every page before its own scripts; what Python asks of a page it asks of `perlVlm`.
(() => {
  "use strict";
  const WIDTH = 160, HEIGHT = 210;
  const OUTSIDE = new Set(["reward-display", "sync-task-cover", "click-canvas", "attention-canvas", "query"]);
  const WHOLE = new Set(["wrap", "area"]);
  const NATIVE = new Set(["button", "input", "textarea", "select", "a", "option"]);
  const INPUTS = {
    checkbox: "checkbox", radio: "radio", password: "password", range: "slider", color: "color",
    submit: "button", button: "button", reset: "button", image: "button",
  };
  const ROLES = new Set([
    "button", "link", "tab", "menuitem", "option", "checkbox", "radio", "slider", "spinbutton", "treeitem",
  ]);
  const SPOTS = [[0.5, 0.5], [0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75], [0.1, 0.5], [0.9, 0.5]];
  const CLICKS = new Set(["click", "dblclick", "mousedown", "mouseup", "pointerdown", "pointerup"]);

  // Nothing in the page tells which elements take clicks, so it is noted when they ask for them.
  const listening = new WeakSet();
  const add = EventTarget.prototype.addEventListener;
  EventTarget.prototype.addEventListener = function (type, ...rest) {
    if (CLICKS.has(type) && this instanceof Element) listening.add(this);
    return add.call(this, type, ...rest);
  };

  // The page's clock stands between two actions. What moves by the browser's own clock would still move.
  add.call(document, "DOMContentLoaded", () => {
    const style = document.createElement("style");
    style.textContent =
      "*, *::before, *::after { caret-color: transparent !important; transition: none !important; " +
      "animation: none !important; scroll-behavior: auto !important; }";
    document.head.appendChild(style);
    // The page's own scripts have been read. What comes later is what somebody typed (the terminal shows that as markup).
    const policy = document.createElement("meta");
    policy.httpEquiv = "Content-Security-Policy";
    policy.content = "script-src 'unsafe-eval'; frame-src 'none'; object-src 'none'";
    document.head.appendChild(policy);
  });

  // Nothing that is clicked leads away from the page, nor opens another.
  add.call(window, "submit", (event) => event.preventDefault());
  add.call(window, "auxclick", (event) => event.target.closest("a") && event.preventDefault(), true);

  // What is copied stays in the page: the browser's clipboard is one for all of its pages.
  let copied = "";
  function selected() {
    const e = document.activeElement;
    if (!e || typeof e.selectionStart !== "number") return String(getSelection());
    return e.type === "password" ? "" : e.value.slice(e.selectionStart, e.selectionEnd);
  }
  function take(event) {
    event.preventDefault();
    const text = selected();
    if (!text) return;
    copied = text;
    if (event.type === "cut") document.execCommand("delete");
  }
  function give(event) {
    event.preventDefault();
    if (copied) document.execCommand("insertText", false, copied);
  }
  for (const [type, listener] of [["copy", take], ["cut", take], ["paste", give]]) add.call(window, type, listener, true);

  const words = (text) => (text || "").replace(/\s+/g, " ").trim();
  const native = (e) => NATIVE.has(e.tagName.toLowerCase());
  const role = (e) => e.getAttribute("role") || "";

  function takesClicks(e) {
    if (native(e) || e.isContentEditable || ROLES.has(role(e)) || listening.has(e) || e.onclick) return true;
    const parent = e.parentElement;
    return getComputedStyle(e).cursor === "pointer" && !(parent && getComputedStyle(parent).cursor === "pointer");
  }

  function kindOf(e) {
    const tag = e.tagName.toLowerCase();
    if (tag === "input") {
      const kind = INPUTS[e.type] || "input";
      return e.checked && (kind === "checkbox" || kind === "radio") ? kind + " on" : kind;
    }
    if (tag === "select") return "list";
    if (tag === "option") return e.selected ? "option on" : "option";
    if (tag === "a" || e.classList.contains("alink")) {
      return e.parentElement && role(e.parentElement) === "tab" ? "tab" : "link";
    }
    if (tag === "button" || tag === "textarea" || e instanceof SVGElement) return tag;
    if (ROLES.has(role(e))) return role(e);
    return "item";
  }

  // What stands on it; of what shows no text, a name that its markup gives.
  function textOf(e) {
    const tag = e.tagName.toLowerCase();
    if (tag === "input") {
      if (e.type === "checkbox" || e.type === "radio") {
        return words((e.labels && e.labels[0] && e.labels[0].textContent) || e.getAttribute("aria-label"));
      }
      return e.type === "password" ? "*".repeat(e.value.length) : words(e.value);
    }
    if (tag === "textarea") return words(e.value);
    if (tag === "select") return [...e.selectedOptions].map((option) => words(option.text)).join(", ");
    const color = e instanceof SVGElement ? e.getAttribute("fill") : e.style.backgroundColor;
    const name = e.getAttribute("aria-label") || e.title || color || (kindOf(e) === "item" && e.classList[0]);
    return words(e.innerText || e.textContent) || words(name);
  }

  // Where a click on the middle reaches it: its first part that is in the frame and not covered, or a single pixel
  // where something lies over the middle alone. Null where nothing of it can be clicked.
  function reach(rects, mine) {
    for (const rect of rects) {
      const left = Math.max(0, Math.ceil(rect.left)), top = Math.max(0, Math.ceil(rect.top));
      const right = Math.min(WIDTH, Math.floor(rect.right)) - 1;
      const bottom = Math.min(HEIGHT, Math.floor(rect.bottom)) - 1;
      if (right < left || bottom < top) continue;
      for (const [across, down] of SPOTS) {
        const x = Math.round(left + across * (right - left)), y = Math.round(top + down * (bottom - top));
        const hit = document.elementFromPoint(x, y);
        if (hit && mine(hit)) return across === 0.5 && down === 0.5 ? [left, top, right, bottom] : [x, y, x, y];
      }
    }
    return null;
  }

  function listed(out, rects, mine, kind, text, clickable) {
    const box = reach(rects, mine);
    if (box) out.push({ kind, text, clickable, box });
  }

  const listElement = (e, out) =>
    listed(out, e.getClientRects(), (hit) => hit === e || e.contains(hit), kindOf(e), textOf(e), true);

  function listText(node, out) {
    const range = document.createRange();
    range.selectNodeContents(node);
    const owner = node instanceof Element ? node : node.parentElement;
    const text = words(node instanceof Element ? node.innerText || node.textContent : node.data);
    if (text) listed(out, range.getClientRects(), (hit) => owner.contains(hit), "text", text, false);
  }

  // Pictures come from the disk in the browser's own time; until they are there a screen is not what it will be.
  const pictures = new Map();
  function picture(url) {
    if (!pictures.has(url)) {
      const image = new Image();
      image.src = url;
      pictures.set(url, image);
    }
    return pictures.get(url);
  }

  async function settled() {
    const seen = [...document.images];
    for (const e of document.querySelectorAll("body, body *")) {
      const url = /url\("(.*?)"\)/.exec(getComputedStyle(e).backgroundImage);
      if (url) seen.push(picture(url[1]));
    }
    const loading = seen.filter((image) => !image.complete);
    await Promise.all(loading.map((image) => image.decode().catch(() => {})));
    return loading.length;
  }

  function walk(e, out) {
    if (OUTSIDE.has(e.id) || e.tagName === "SCRIPT" || e.tagName === "STYLE") return;
    if (e.tagName === "INPUT" && e.type === "hidden") return;
    if (getComputedStyle(e).display === "none") return;
    const whole = WHOLE.has(e.id) || e === document.body;
    const clickable = !whole && takesClicks(e);
    // A list that shows its options has them clicked one by one; of any other control nothing inside is apart.
    const options = e.tagName === "SELECT" && (e.multiple || e.size > 1);
    if (clickable && native(e) && !options) return listElement(e, out);
    const start = out.length;
    const texts = [...e.childNodes].filter((node) => node instanceof Text && words(node.data));
    for (const node of e.childNodes) {
      if (node instanceof Element) walk(node, out);
      // Many pieces of text between links are prose: the picture shows it, and a list of pieces would not.
      else if (node instanceof Text && texts.length <= 2 && !insideLabel(e)) listText(node, out);
    }
    const inside = out.slice(start);
    if (inside.some((one) => one.clickable)) return;
    if (clickable && inside.length > 1 && !inlineOnly(e)) {
      // It takes the clicks on its parts, such as the items of a list that can be sorted.
      for (const one of inside) Object.assign(one, { kind: "item", clickable: true });
    } else if (clickable) {
      out.length = start;
      listElement(e, out);
    } else if (!whole && inside.length > 1 && inlineOnly(e)) {
      out.length = start;
      listText(e, out);
    }
  }

  // The label of a control is the control's text.
  const insideLabel = (e) => e.tagName === "LABEL" && e.control !== null;
  const inlineOnly = (e) => [...e.children].every((child) => getComputedStyle(child).display.startsWith("inline"));

  // Nothing else begins an episode: a click on the cover of one that has ended would begin the next, and the reward would
  // be gone. An action may have several clicks, and the first of them may end the episode.
  let begin = null;
  function begun() {
    if (!begin) throw new Error("the page of the episode was left for another");
  }

  window.perlVlm = {
    // Begin the episode of a seed, on a page that was just loaded or one that is in an episode already.
    start(seed) {
      if (!begin) {
        begin = core.startEpisodeReal;
        core.startEpisodeReal = () => {};
      }
      copied = "";
      if (core.EP_TIMER !== null) core.endEpisode(0);
      if (document.activeElement) document.activeElement.blur();
      Math.seedrandom(seed);
      core.EPISODE_MAX_TIME = 3600000;
      begin();
    },
    over() {
      begun();
      return WOB_DONE_GLOBAL;
    },
    async look() {
      begun();
      if (WOB_DONE_GLOBAL) return { over: true, reward: WOB_RAW_REWARD_GLOBAL };
      await settled();
      // Drawn anew as a whole: where only a part is, edges can come out one shade off, depending on what was drawn before.
      const root = document.documentElement.style;
      root.willChange = root.willChange ? "" : "opacity";
      const said = core.getUtterance();
      const elements = [];
      walk(document.body, elements);
      return { over: false, utterance: words(typeof said === "string" ? said : said.utterance), elements };
    },
    editable() {
      const e = document.activeElement;
      return !!e && (e.tagName === "TEXTAREA" || e.isContentEditable || (e.tagName === "INPUT" && !INPUTS[e.type]) ||
        (e.tagName === "INPUT" && e.type === "password"));
    },
    // Focus the list at a point without opening it. False where there is none.
    focusList(x, y) {
      const e = document.elementFromPoint(x, y);
      if (!(e instanceof HTMLSelectElement)) return false;
      e.focus();
      return true;
    },
  };
})();
