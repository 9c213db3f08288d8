// Search: modules, families, reasons, operands, operations of graphs, kernels and lines of code. What can be found is
// what the page shows, marked with `data-find`; nothing is indexed twice. Without it, the browser's own search serves.
const MOST_HITS = 40;
const HITS_OF_A_BLOCK = 3;
const HITS_OF_A_KIND = 10; // of one mixer: the names of 64 equal modules leave room for what else there is

/**
 * @typedef {object} Entry something that can be found
 * @property {Element} element where it stands
 * @property {string} kind what it is, "module" for example
 * @property {string} text what it is called
 * @property {string} low the same in lower case
 */

const words = (element) => element.textContent.trim().replace(/\s+/g, " ");

/** @returns {Entry} */
function entry(element) {
  const text = (element.querySelector("title")?.textContent ?? words(element)).trim();
  return { element, kind: element.dataset.find, text, low: text.toLowerCase() };
}

/** Where a word stands in a text, once a line: its place, and the line's ends. @returns {Record<string, number>[]} */
function lines(text, word) {
  const found = [];
  for (let at = text.indexOf(word); at >= 0; ) {
    const start = text.lastIndexOf("\n", at) + 1;
    const next = text.indexOf("\n", at);
    const end = next < 0 ? text.length : next;
    found.push({ at, start, end });
    at = text.indexOf(word, end);
  }
  return found;
}

/** The text from `at` on, in the nodes below an element, as a range. */
function range(element, at, length) {
  const found = document.createRange();
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  let passed = 0;
  for (let node = walker.nextNode(), begun = false; node; node = walker.nextNode()) {
    const next = passed + node.data.length;
    if (!begun && at < next) {
      found.setStart(node, at - passed);
      begun = true;
    }
    if (begun && at + length <= next) {
      found.setEnd(node, at + length - passed);
      return found;
    }
    passed = next;
  }
  return found;
}

/** Opens whatever is folded around an element, shows it, and gives it the focus. */
function show(element, at, length) {
  for (let fold = element.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  for (const old of document.querySelectorAll(".found")) old.classList.remove("found");
  element.setAttribute("tabindex", "-1");
  if (at === undefined) {
    element.classList.add("found");
    element.scrollIntoView({ block: "center", inline: "center" });
  } else {
    const place = range(element, at, length);
    getSelection().removeAllRanges();
    getSelection().addRange(place);
    place.startContainer.parentElement.scrollIntoView({ block: "center" });
  }
  element.focus({ preventScroll: true });
}

const context = (element) => {
  const heading = element.closest("article")?.querySelector("h2");
  const figure = element.closest("figure")?.querySelector("figcaption .name");
  return [heading, figure].filter(Boolean).map(words).join(", ");
};

/** The first entries of each kind in each article. @param {Entry[]} entries */
function few(entries) {
  const counts = new Map();
  return entries.filter(({ element, kind }) => {
    const key = `${kind} ${element.closest("article")?.id}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
    return counts.get(key) <= HITS_OF_A_KIND;
  });
}

(() => {
  const form = document.querySelector(".search");
  const input = form.querySelector("input");
  const list = form.querySelector("ol");
  const status = form.querySelector("[role=status]");
  /** @type {Entry[]} */
  const entries = [...document.querySelectorAll("main [data-find]")].map(entry);
  const blocks = [...document.querySelectorAll("main .code")].map((element) => {
    return { element, text: element.textContent, low: element.textContent.toLowerCase() };
  });
  form.hidden = false;

  const add = (text, kind, element, at, length) => {
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = `#${element.closest("[id]")?.id ?? "main"}`;
    link.textContent = text;
    link.addEventListener("click", (event) => {
      event.preventDefault();
      show(element, at, length);
    });
    const where = document.createElement("span");
    where.className = "quiet";
    where.textContent = [kind, context(element)].filter(Boolean).join(" · ");
    item.append(link, where);
    list.append(item);
  };

  const search = () => {
    const word = input.value.trim().toLowerCase();
    list.replaceChildren();
    if (!word) {
      status.textContent = "";
      return;
    }
    const named = entries.filter(({ low }) => low.includes(word));
    const hits = few(named).map((e) => [e.text.split("\n")[0], e.kind, e.element]);
    let total = named.length;
    for (const { element, text, low } of blocks) {
      const found = lines(low, word);
      total += found.length;
      for (const { at, start, end } of found.slice(0, HITS_OF_A_BLOCK)) {
        hits.push([text.slice(start, end).trim(), "code", element, at, word.length]);
      }
    }
    for (const hit of hits.slice(0, MOST_HITS)) add(...hit);
    const shown = Math.min(hits.length, MOST_HITS);
    status.textContent = !total ? "Nothing found." : shown < total ? `${shown} of ${total} places` : `${total} places`;
  };

  input.addEventListener("input", search);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    list.querySelector("a")?.click();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      input.focus();
      input.select();
    }
    if (event.key === "Escape" && form.contains(document.activeElement)) {
      input.value = "";
      search();
      input.focus();
    }
  });
})();
