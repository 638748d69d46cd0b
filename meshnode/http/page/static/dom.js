// Makes elements. Text from outside becomes text nodes and nothing else.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element with attributes and children (nodes, texts, or lists of them; null and false are left out). */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

/** The element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Set a text only if it is another one: what a screen reader has said it does not say again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Give an element these children; those that are as before stay, with what a person has marked in them. */
export function fill(place, children) {
  const before = [...place.childNodes];
  children.forEach((child, index) => {
    if (!before[index]) place.append(child);
    else if (!before[index].isEqualNode(child)) before[index].replaceWith(child);
  });
  for (const left of before.slice(children.length)) left.remove();
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== false && child !== undefined));
  return element;
}
