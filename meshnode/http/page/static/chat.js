// The conversation: streamed answers, stop, edit, again, feedback.

import { Refused, events, json, request } from "/page/api.js";
import { byId, el, fill } from "/page/dom.js";
import { markdown } from "/page/markdown.js";

const ENDS = { length: "The answer was cut: it reached its limit of tokens.", stop: "" };

export class Chat {
  /** told.receipt(receipt): an answer is whole. told.asking(bool): one begins or ends. */
  constructor(told) {
    this.told = told;
    this.turns = []; // {role, text, article, body}
    this.running = null; // AbortController of the answer that is being written
    this.log = byId("turns");
    this.question = byId("question");
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.question.value.trim();
      if (!text || this.running) return;
      this.question.value = "";
      this.send(text);
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("ask").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.clear());
  }

  clear() {
    this.stop();
    this.cut(0);
    this.question.focus();
  }

  stop() {
    this.running?.abort();
  }

  async send(text) {
    this.add("user", text);
    await this.answer();
  }

  /** Take away this turn and all after it. */
  cut(index) {
    for (const turn of this.turns.splice(index)) turn.article.remove();
  }

  add(role, text) {
    const body = el("div", { class: "body" });
    const foot = el("div", { class: "foot" });
    const turn = { role, text, body, foot };
    turn.article = el("article", { class: role, "aria-label": role === "user" ? "You" : "Answer" }, body, foot);
    if (role === "user") {
      body.textContent = text;
      foot.append(el("button", { type: "button", onclick: () => this.edit(turn) }, "Edit"));
    }
    this.turns.push(turn);
    this.log.append(turn.article);
    this.bottom(true);
    return turn;
  }

  /** Change a question: what was said after it goes. */
  edit(turn) {
    const index = this.turns.indexOf(turn);
    if (index < 0) return;
    const field = el("textarea", { rows: 3, "aria-label": "Your question, changed" });
    field.value = turn.text;
    const back = () => {
      turn.body.textContent = turn.text;
      turn.foot.hidden = false;
    };
    const form = el(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          const text = field.value.trim();
          if (!text) return;
          this.stop();
          this.cut(this.turns.indexOf(turn));
          this.send(text);
        },
      },
      field,
      el("div", { class: "buttons" }, el("button", { type: "submit" }, "Ask again"), el("button", { type: "button", onclick: back }, "Leave it")),
    );
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") back();
    });
    turn.foot.hidden = true;
    turn.body.replaceChildren(form);
    field.focus();
  }

  /** Another answer to the same question. */
  again(turn) {
    this.stop();
    this.cut(this.turns.indexOf(turn));
    this.answer();
  }

  async answer() {
    const messages = this.turns.filter((turn) => turn.text).map(({ role, text }) => ({ role, content: text }));
    const system = byId("system").value.trim();
    if (system) messages.unshift({ role: "system", content: system });
    const turn = this.add("assistant", "");
    const stopped = (this.running = new AbortController());
    this.busy(true);
    turn.article.setAttribute("aria-busy", "true");
    turn.foot.textContent = "waiting for the first token…";
    let id = "";
    let end = "";
    try {
      const response = await request("/v1/chat/completions", {
        signal: stopped.signal,
        body: {
          model: chosenModel(),
          messages,
          stream: true,
          temperature: number("temperature", 0.7),
          max_tokens: number("max-tokens", 512),
        },
      });
      id = response.headers.get("x-meshnode-receipt") ?? "";
      end = await this.read(response, turn);
    } catch (error) {
      end = error.name === "AbortError" ? "Stopped." : error instanceof Refused ? error.message : `The answer broke off: ${error.message}`;
      if (error.name !== "AbortError") turn.article.classList.add("failed");
    }
    if (this.running === stopped) {
      this.running = null;
      this.busy(false);
    }
    turn.article.removeAttribute("aria-busy");
    this.render(turn);
    await this.finish(turn, id, end);
  }

  /** Take the pieces as they come; gives a sentence about the end. Throws Refused when the node ends it with an error. */
  async read(response, turn) {
    let reason = "";
    let pieces = 0;
    let first = 0;
    for await (const { data } of events(response)) {
      if (!data || data === "[DONE]") continue;
      const document = JSON.parse(data);
      if (document.error) throw new Refused(500, document.error.message);
      const [choice] = document.choices;
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (!choice.delta.content) continue;
      turn.text += choice.delta.content;
      pieces += 1;
      first ||= performance.now();
      const seconds = (performance.now() - first) / 1000;
      if (pieces > 1 && seconds > 0.2) turn.foot.textContent = `about ${((pieces - 1) / seconds).toFixed(1)} tokens a second`;
      this.soon(turn);
    }
    if (!reason) throw new Refused(0, "The answer broke off: the connection to this node has ended.");
    return ENDS[reason] ?? "";
  }

  /** Draw at most once a frame. */
  soon(turn) {
    if (turn.drawing) return;
    turn.drawing = true;
    requestAnimationFrame(() => {
      turn.drawing = false;
      this.render(turn);
    });
  }

  render(turn) {
    const follow = this.atBottom();
    fill(turn.body, markdown(turn.text));
    this.bottom(follow);
  }

  atBottom() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
  }

  bottom(follow) {
    if (follow) this.log.scrollTop = this.log.scrollHeight;
  }

  async finish(turn, id, end) {
    const follow = this.atBottom();
    let receipt = null;
    if (id && !turn.article.classList.contains("failed") && end !== "Stopped.") {
      try {
        receipt = await json(`/v1/receipts/${encodeURIComponent(id)}`);
        receipt = { id: receipt.id, ...receipt.answers[0] };
      } catch {
        receipt = null; // the node forgets old ones; the answer stands without
      }
    }
    const speed = receipt?.decode_tok_s ? `${receipt.decode_tok_s.toFixed(1)} tokens a second` : "";
    turn.foot.replaceChildren(
      el("button", { type: "button", onclick: () => this.again(turn) }, "Again"),
      ...(receipt?.answer ? this.judging(receipt.answer) : []),
      el("span", { class: "quiet" }, [end, speed].filter(Boolean).join(" ")),
    );
    if (receipt) this.told.receipt(receipt);
    this.bottom(follow);
  }

  /** Buttons for right and wrong; a wrong answer may be told what would have been right. */
  judging(answer) {
    const said = el("span", { role: "status", class: "quiet" });
    const right = el("button", { type: "button" }, "Right");
    const wrong = el("button", { type: "button" }, "Wrong");
    const field = el("input", { type: "text", "aria-label": "The right answer, if you know it", placeholder: "the right answer, if you know it" });
    const form = el("form", { class: "label", hidden: true }, field, el("button", { type: "submit" }, "Send"));
    const judge = async (correct, label) => {
      try {
        await request("/v1/feedback", { body: { answer, correct, label } });
        said.textContent = correct ? "Noted: right." : "Noted: wrong.";
        right.setAttribute("aria-pressed", String(correct));
        wrong.setAttribute("aria-pressed", String(!correct));
        form.hidden = true;
      } catch (error) {
        said.textContent = error.message;
      }
    };
    right.addEventListener("click", () => judge(true, ""));
    wrong.addEventListener("click", () => {
      form.hidden = !form.hidden;
      if (!form.hidden) field.focus();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      judge(false, field.value.trim());
    });
    return [right, wrong, form, said];
  }

  busy(now) {
    byId("send").hidden = now;
    byId("stop").hidden = !now;
    this.told.asking(now);
  }
}

function chosenModel() {
  const adapter = byId("adapter").value;
  return byId("model").value + (adapter && `@${adapter}`);
}

function number(id, otherwise) {
  const value = Number.parseFloat(byId(id).value);
  return Number.isFinite(value) ? value : otherwise;
}
