// The node's status as it changes.

import { Refused, events, request } from "/page/api.js";

const SILENCE_MS = 25_000; // the node says something every 10 s
const PAUSE_MS = [250, 500, 1000, 2000, 4000];

/**
 * Follow /events for as long as the page lives.
 * told.status(status): it changed. told.lost(sentence): the node does not answer; it is asked again.
 * told.refused(error): it says no, with 401 for a missing key; resolve the promise that this gives to ask again.
 */
export async function follow(told) {
  let failures = 0;
  for (;;) {
    const silence = new AbortController();
    let alarm = setTimeout(() => silence.abort(), SILENCE_MS);
    try {
      const response = await request("/events", { signal: silence.signal });
      for await (const { name, data } of events(response)) {
        clearTimeout(alarm);
        alarm = setTimeout(() => silence.abort(), SILENCE_MS);
        failures = 0;
        if (name === "status") told.status(JSON.parse(data));
      }
      told.lost("This node has stopped.");
    } catch (error) {
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
        await told.refused(error);
        continue;
      }
      told.lost(error instanceof Refused ? error.message : "This node does not answer. Does it still run?");
    } finally {
      clearTimeout(alarm);
    }
    await new Promise((wake) => setTimeout(wake, PAUSE_MS[Math.min(failures, PAUSE_MS.length - 1)]));
    failures += 1;
  }
}
