// Draws which expert sits where, how hot it is, and memory against budgets, once a second
// while somebody is looking.

const $ = (id) => document.getElementById(id);
const PERIOD = 1000; // milliseconds
let last = null; // {time, tokens} of the reading before
let shown = null;

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${bytes.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

function colours(tiers) {
  const style = getComputedStyle(document.documentElement);
  return tiers.map((tier) => style.getPropertyValue(`--${tier}`).trim());
}

function draw(picture) {
  const canvas = $("experts");
  const rows = picture.tier ?? [];
  const columns = picture.experts || 0;
  if (!rows.length || !columns) {
    canvas.hidden = true;
    return;
  }
  canvas.hidden = false;
  const cell = Math.max(1, Math.min(12, Math.floor(640 / columns)));
  canvas.width = columns * cell;
  canvas.height = rows.length * cell;
  const pen = canvas.getContext("2d");
  const colour = colours(picture.tiers);
  const gap = cell > 3 ? 1 : 0;
  rows.forEach((tiers, layer) =>
    tiers.forEach((tier, expert) => {
      const heat = picture.heat?.[layer]?.[expert];
      pen.globalAlpha = heat === undefined ? 0.8 : 0.2 + 0.8 * Math.sqrt(heat);
      pen.fillStyle = colour[tier];
      pen.fillRect(expert * cell, layer * cell, cell - gap, cell - gap);
    }),
  );
}

function describe(picture) {
  if (!picture.loaded) return "No model is loaded yet.";
  if (!picture.experts) return `${picture.model} has no experts.`;
  const counts = picture.tiers.map((_, tier) => picture.tier.flat().filter((t) => t === tier).length);
  const where = picture.tiers.map((tier, i) => `${counts[i]} in ${tier}`).filter((_, i) => counts[i]);
  return `${picture.layers} layers of ${picture.experts} experts: ${where.join(", ")}.`;
}

function bars(picture) {
  const totals = {};
  for (const { tier, bytes } of picture.memory ?? []) totals[tier] = (totals[tier] ?? 0) + bytes;
  return Object.entries(totals).map(([tier, bytes]) => {
    const budget = picture.budgets?.[tier];
    const bar = document.createElement("div");
    bar.className = `bar ${tier}-bar`;
    const label = document.createElement("label");
    label.textContent = tier === "disk" ? "Disk" : tier.toUpperCase();
    const amount = document.createElement("span");
    amount.className = "amount";
    amount.textContent = budget ? `${size(bytes)} of ${size(budget)}` : size(bytes);
    const progress = document.createElement("progress");
    progress.max = budget || bytes || 1;
    progress.value = bytes;
    label.append(amount, progress);
    bar.append(label);
    return bar;
  });
}

function figures(picture) {
  const now = performance.now();
  const tokens = picture.generated_tokens ?? 0;
  if (last && tokens >= last.tokens) {
    const rate = ((tokens - last.tokens) / (now - last.time)) * 1000;
    $("rate").textContent = rate.toFixed(1);
  }
  last = { time: now, tokens };
  const hits = picture.hit_rate;
  $("hits").textContent = hits === null || hits === undefined ? "no tiers" : `${(hits * 100).toFixed(1)} %`;
  $("load").textContent = `${picture.running ?? 0}, ${picture.waiting ?? 0}`;
}

function point(event) {
  if (!shown?.tier?.length) return;
  const box = $("experts").getBoundingClientRect();
  const expert = Math.floor(((event.clientX - box.left) / box.width) * shown.experts);
  const layer = Math.floor(((event.clientY - box.top) / box.height) * shown.tier.length);
  const tier = shown.tiers[shown.tier[layer]?.[expert]];
  if (!tier) return;
  const heat = shown.heat?.[layer]?.[expert];
  const hot = heat === undefined ? "" : `, heat ${heat.toFixed(2)}`;
  $("cell").textContent = `layer ${layer}, expert ${expert}: ${tier}${hot}`;
}

async function look(model) {
  if (document.visibilityState !== "visible") return;
  const query = model ? `?model=${encodeURIComponent(model)}` : "";
  const response = await fetch(`/placement${query}`);
  if (!response.ok) return;
  shown = await response.json();
  draw(shown);
  const text = describe(shown);
  if ($("experts").getAttribute("aria-label") !== text) $("experts").setAttribute("aria-label", text);
  $("memory").replaceChildren(...bars(shown));
  figures(shown);
}

export function watchPlacement(model) {
  $("experts").addEventListener("pointermove", point);
  const again = async () => {
    try {
      await look(model());
    } catch {
      // The server may be gone for a moment; the next look will tell.
    }
    setTimeout(again, PERIOD);
  };
  again();
}
