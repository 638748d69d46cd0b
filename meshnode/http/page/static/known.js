// Who was seen since the page was opened, so that a node that goes does not just vanish.

const KEPT_MS = 10 * 60_000; // so long a node that went is shown

export class Known {
  constructor() {
    this.nodes = new Map(); // peer -> {row, me, connected: it was once, gone: since when, ms; why}
  }

  /** Take in a status; gives all nodes, ours first. */
  update(status, now) {
    const rows = [status.me, ...status.peers];
    for (const row of rows) {
      const before = this.nodes.get(row.peer);
      const me = row.peer === status.me.peer;
      const connected = me || row.connected || Boolean(before?.connected);
      const lost = !me && !row.connected && connected;
      this.nodes.set(row.peer, {
        row,
        me,
        connected,
        gone: lost ? (before?.gone ?? now) : null,
        why: lost ? "lost: the connection has ended" : "",
      });
    }
    const here = new Set(rows.map((row) => row.peer));
    for (const [peer, node] of this.nodes) {
      if (here.has(peer)) continue;
      node.me = false;
      node.gone ??= now;
      node.why = node.row.state === "draining" ? "has left" : "lost: nothing was heard of it";
      if (now - node.gone > KEPT_MS) this.nodes.delete(peer);
    }
    return [...this.nodes.values()].sort((a, b) => b.me - a.me || order(a.row) - order(b.row) || (a.row.peer < b.row.peer ? -1 : 1));
  }
}

function order(row) {
  return row.first ?? Infinity;
}
