// The chat: sends the conversation to the same API as any other client and shows the answer
// as it comes. What is drawn beside it is placement.js's business.
import { watchPlacement } from "/static/placement.js";

const $ = (id) => document.getElementById(id);
const history = []; // {role, content, reasoning}
let running = null; // AbortController of the answer that is being written

const numbers = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

async function errorOf(response) {
  const text = await response.text();
  try {
    const error = JSON.parse(text).error;
    return error.message || error;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function loadModels() {
  const response = await fetch("/v1/models");
  if (!response.ok) throw new Error(await errorOf(response));
  const names = (await response.json()).data.map((model) => model.id);
  $("model").replaceChildren(...names.map((name) => new Option(name, name)));
  if (!names.length) say("This server has no model; see 'greenroom list'.");
}

function say(text) {
  $("status").textContent = text;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function addMessage(role, text) {
  const article = element("article", role, "");
  const content = element("div", "text", text);
  article.append(element("h3", "", { user: "You", assistant: "Model", error: "Error" }[role]), content);
  $("messages").append(article);
  scroll(true);
  return { article, content, reasoning: null };
}

function scroll(always) {
  const box = $("messages");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 80) box.scrollTop = box.scrollHeight;
}

function settings() {
  const found = {};
  for (const name of numbers) {
    if ($(name).value !== "") found[name] = Number($(name).value);
  }
  return found;
}

async function takesChat(model) {
  const props = await (await fetch("/props")).json();
  return props.loaded[model]?.chat ?? true;
}

async function request() {
  await ready;
  const model = $("model").value;
  const body = { model, stream: true, stream_options: { include_usage: true }, ...settings() };
  if (!(await takesChat(model))) {
    return ["/v1/completions", { ...body, prompt: history.map((m) => m.content).join("") }];
  }
  const system = $("system").value.trim();
  body.messages = history.map(({ role, content }) => ({ role, content }));
  if (system) body.messages.unshift({ role: "system", content: system });
  if ($("reasoning_effort").value) body.reasoning_effort = $("reasoning_effort").value;
  return ["/v1/chat/completions", body];
}

// The events of a stream, parsed.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function showReasoning(shown, text) {
  if (!shown.reasoning) {
    const details = element("details", "", "");
    details.append(element("summary", "", "Reasoning"), (shown.reasoning = element("div", "text", "")));
    shown.content.before(details);
  }
  shown.reasoning.textContent += text;
}

function take(part, shown, answer) {
  if (part.error) throw new Error(part.error.message);
  if (part.usage) answer.usage = part.usage;
  const choice = part.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? { content: choice.text };
  if (delta.reasoning_content) {
    answer.reasoning += delta.reasoning_content;
    showReasoning(shown, delta.reasoning_content);
  }
  if (delta.content) {
    answer.first ??= performance.now();
    answer.content += delta.content;
    shown.content.append(delta.content);
  }
  answer.finish = choice.finish_reason ?? answer.finish;
  scroll(false);
}

function figures(answer, started) {
  const seconds = (performance.now() - started) / 1000;
  if (!answer.usage) return `stopped after ${seconds.toFixed(1)} s`;
  const { prompt_tokens: prompt, completion_tokens: made } = answer.usage;
  const rate = (made / seconds).toFixed(1);
  const first = answer.first ? `, first text after ${((answer.first - started) / 1000).toFixed(2)} s` : "";
  const cut = answer.finish === "length" ? ", cut off at the most tokens" : "";
  return `${prompt} + ${made} tokens, ${rate} tokens/s${first}${cut}`;
}

function busy(on) {
  $("stop").disabled = !on;
  $("send").disabled = on;
  $("again").disabled = on || !history.some((m) => m.role === "assistant");
  $("messages").setAttribute("aria-busy", String(on));
}

async function answer() {
  const shown = addMessage("assistant", "");
  const found = { role: "assistant", content: "", reasoning: "", usage: null, finish: null };
  const started = performance.now();
  running = new AbortController();
  busy(true);
  say("The model is writing.");
  try {
    const [path, body] = await request();
    const response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const part of events(response)) take(part, shown, found);
    say("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else {
      addMessage("error", error.message);
      say("That did not work.");
    }
  }
  running = null;
  if (found.content || found.reasoning) {
    history.push(found);
    shown.article.append(element("p", "figures", figures(found, started)));
  } else shown.article.remove();
  busy(false);
  $("prompt").focus();
}

function submit(event) {
  event?.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || running) return;
  $("prompt").value = "";
  history.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
}

function regenerate() {
  if (running) return;
  while (history.length && history.at(-1).role !== "user") history.pop();
  const articles = [...$("messages").children];
  while (articles.length && !articles.at(-1).classList.contains("user")) articles.pop().remove();
  if (history.length) answer();
}

$("form").addEventListener("submit", submit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("again").addEventListener("click", regenerate);
$("new").addEventListener("click", () => {
  running?.abort();
  history.length = 0;
  $("messages").replaceChildren();
  say("New chat.");
  busy(false);
  $("prompt").focus();
});

const ready = loadModels().catch((error) => say(error.message));
watchPlacement(() => $("model").value);
$("prompt").focus();
