// Which models and adapters can be asked.

import { json } from "/page/api.js";
import { byId, el } from "/page/dom.js";
import { short } from "/page/words.js";

const USABLE = ["open", "rolling", "held", "released"];

/** The adapters that this node knows. */
export function showAdapters(status) {
  const known = status.releases.filter((one) => USABLE.includes(one.phase)).map((one) => [one.adapter, `${one.version || short(one.adapter)} (${one.phase})`]);
  options(byId("adapter"), [["", "as the network says"], ["none", "none"], ...known]);
}

/** The models that are served. Throws what `json` throws. */
export async function showModels() {
  const { data } = await json("/v1/models");
  options(byId("model"), [["auto", "auto"], ...data.map((model) => [model.id, model.id])]);
}

/** Replace what can be chosen, and keep what was. */
function options(select, wanted) {
  const before = [...select.options].map((option) => [option.value, option.text]);
  if (JSON.stringify(before) === JSON.stringify(wanted)) return;
  const chosen = select.value;
  select.replaceChildren(...wanted.map(([value, text]) => el("option", { value }, text)));
  if (wanted.some(([value]) => value === chosen)) select.value = chosen;
}
