// Figures and states in words, as `meshnode status` says them.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function size(bytes) {
  let unit = 0;
  while (bytes >= 1000 && unit < UNITS.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${bytes < 10 && unit > 0 ? bytes.toFixed(1) : Math.round(bytes)} ${UNITS[unit]}`;
}

export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

export function short(peer) {
  return peer.length > 10 ? `${peer.slice(0, 4)}…${peer.slice(-4)}` : peer;
}

export function nameOf(row) {
  return row.name || short(row.peer);
}

/** Layers are [first, last). */
export function layers(first, last) {
  return last - first === 1 ? `layer ${first}` : `layers ${first}–${last - 1}`;
}

export function ms(value) {
  return value < 10 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`;
}

export function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}

/** What a node does. */
export function does(row) {
  const holds = row.first === null ? "" : layers(row.first, row.last);
  const target = row.target ? layers(row.target[0], row.target[1]) : "";
  switch (row.state) {
    case "serving":
      return `serves ${holds}`;
    case "draining":
      return `is leaving, still serves ${holds}`;
    case "intent":
      return `is going to serve ${target}${holds && `, serves ${holds}`}`;
    case "loading":
      return `loads ${target}${holds && `, serves ${holds}`}`;
    default:
      return row.memory_bytes ? "serves no layers" : "meeting point, serves no layers";
  }
}
