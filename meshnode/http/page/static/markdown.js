// Markdown as elements. It never parses HTML and loads nothing: tags stay text, an image becomes a link to it.

import { el } from "/page/dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^ *\|?(?: *:?-+:? *\|)+ *(?::?-+:? *)?$/;
const MAX_DEPTH = 8; // of lists and quotes in each other; deeper ones are text

/** The elements of a text. */
export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const made = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let found;
    if (!line.trim()) {
      at += 1;
    } else if ((found = FENCE.exec(line))) {
      const end = closing(lines, at + 1, found[1]);
      made.push(code(lines.slice(at + 1, end).join("\n"), found[2].trim()));
      at = end + 1;
    } else if ((found = HEADING.exec(line))) {
      made.push(el(`h${Math.min(6, found[1].length + 2)}`, {}, inline(found[2]))); // below the page's own headings
      at += 1;
    } else if (RULE.test(line)) {
      made.push(el("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      const end = until(lines, at, (next) => QUOTE.test(next));
      made.push(el("blockquote", {}, blocks(lines.slice(at, end).map((one) => QUOTE.exec(one)[1]), depth + 1)));
      at = end;
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      const [list, end] = listAt(lines, at, depth);
      made.push(list);
      at = end;
    } else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) {
      const end = until(lines, at + 2, (next) => next.includes("|"));
      made.push(table(line, lines.slice(at + 2, end)));
      at = end;
    } else {
      const end = until(lines, at + 1, (next) => next.trim() && !begins(next, depth));
      made.push(el("p", {}, inline(lines.slice(at, end).join("\n"))));
      at = end;
    }
  }
  return made;
}

function begins(line, depth) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || (depth < MAX_DEPTH && (QUOTE.test(line) || ITEM.test(line)));
}

function until(lines, from, goesOn) {
  let end = from;
  while (end < lines.length && goesOn(lines[end])) end += 1;
  return end;
}

/** The line that ends a fence; the end of the text while it is still being written. */
function closing(lines, from, fence) {
  return until(lines, from, (line) => !(line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "")));
}

function code(text, language) {
  const copy = el("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Can't copy";
    }
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  const head = el("div", { class: "code-head" }, el("span", {}, language.slice(0, 30)), copy);
  return el("div", { class: "code" }, head, el("pre", { tabindex: 0 }, el("code", {}, text)));
}

function listAt(lines, from, depth) {
  const [, indent, mark] = ITEM.exec(lines[from]);
  const numbered = /\d/.test(mark);
  const items = [];
  let at = from;
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || found[1].length > indent.length + 1 || found[1].length < indent.length) break;
    if (/\d/.test(found[2]) !== numbered) break;
    const inside = found[1].length + 2;
    const end = until(lines, at + 1, (next) => next.trim() && spaces(next) >= inside);
    const content = [found[3], ...lines.slice(at + 1, end).map((line) => line.slice(Math.min(spaces(line), inside + 1)))];
    const parts = blocks(content, depth + 1);
    items.push(el("li", {}, parts.length === 1 && parts[0].tagName === "P" ? [...parts[0].childNodes] : parts));
    at = end;
    while (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  const start = numbered ? Number.parseInt(mark, 10) : null;
  return [el(numbered ? "ol" : "ul", { start: numbered && start !== 1 ? start : null }, items), at];
}

function spaces(line) {
  return line.length - line.trimStart().length;
}

function table(head, rows) {
  const cells = (line, tag) => el("tr", {}, split(line).map((cell) => el(tag, tag === "th" ? { scope: "col" } : {}, inline(cell))));
  return el("div", { class: "scroll", tabindex: 0 }, el("table", {}, el("thead", {}, cells(head, "th")), el("tbody", {}, rows.map((row) => cells(row, "td")))));
}

function split(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

// ------------------------------------------------------------ inside a line

const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const ADDRESS = /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]]/;

/** The nodes of a line: one pass; a mark that is not closed is text. */
function inline(text, depth = 0) {
  const made = [];
  const without = new Set(); // marks that are not closed behind here: looking again would take ever longer
  let plain = "";
  const flush = () => {
    if (plain) made.push(document.createTextNode(plain));
    plain = "";
  };
  const put = (node) => {
    flush();
    made.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const rest = text[at];
    if (rest === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (rest === "`") {
      const ticks = run(text, at);
      const end = without.has(ticks) ? -1 : text.indexOf(ticks, at + ticks.length);
      if (end < 0) {
        without.add(ticks);
        plain += ticks;
        at += ticks.length;
      } else {
        put(el("code", {}, text.slice(at + ticks.length, end).trim()));
        at = end + ticks.length;
      }
    } else if ((rest === "[" || (rest === "!" && text[at + 1] === "[")) && depth < MAX_DEPTH) {
      const link = linkAt(text, rest === "!" ? at + 1 : at, depth);
      if (link) {
        put(link.node);
        at = link.end;
      } else {
        plain += rest;
        at += 1;
      }
    } else if (rest === "h" && ADDRESS.test(text.slice(at, at + 2000)) && !/\w/.test(text[at - 1] ?? "")) {
      const [url] = ADDRESS.exec(text.slice(at, at + 2000));
      put(anchor(url, [url]));
      at += url.length;
    } else {
      const span = depth < MAX_DEPTH ? spanAt(text, at, without) : null;
      if (span) {
        put(el(span.tag, {}, inline(span.inside, depth + 1)));
        at = span.end;
      } else {
        plain += rest;
        at += 1;
      }
    }
  }
  flush();
  return made;
}

function run(text, at) {
  let end = at;
  while (text[end] === "`") end += 1;
  return text.slice(at, end);
}

function spanAt(text, at, without) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at) || without.has(mark)) continue;
    const from = at + mark.length;
    if (!text[from] || /\s/.test(text[from])) continue;
    if (mark[0] === "_" && /\w/.test(text[at - 1] ?? "")) continue; // snake_case
    let end = text.indexOf(mark, from);
    while (end >= 0 && (/\s/.test(text[end - 1]) || end === from || (mark.length === 1 && text[end + 1] === mark))) {
      end = text.indexOf(mark, end + (text[end + 1] === mark ? 2 : 1));
    }
    if (end < 0) {
      without.add(mark);
      continue;
    }
    if (mark.length === 2 && text[end + 2] === mark[0]) end += 1; // the first of three ends what is inside
    return { tag, inside: text.slice(from, end), end: end + mark.length };
  }
  return null;
}

const MAX_LINK = 2000; // characters of a link's words or address

function linkAt(text, at, depth) {
  const middle = text.indexOf("](", at);
  if (middle < 0 || middle - at > MAX_LINK || text.slice(at + 1, middle).includes("\n\n")) return null;
  const end = text.indexOf(")", middle);
  if (end < 0 || end - middle > MAX_LINK) return null;
  const url = text.slice(middle + 2, end).trim().split(/\s/)[0];
  if (!/^(https?:\/\/|mailto:)/i.test(url)) return null;
  return { node: anchor(url, inline(text.slice(at + 1, middle), depth + 1)), end: end + 1 };
}

function anchor(url, words) {
  return el("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, words.length ? words : url);
}
