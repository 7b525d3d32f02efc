/* What is chosen, and what follows from it. */

const FILTERS = { all: "all", mixed: "mixed", right: "all right", wrong: "all wrong" };
const SEARCH_DELAY = 150; // milliseconds after the last key

const index = loadIndex();
const rewardRange = extent(index.trees.flatMap(({ rewards }) => rewards.map(([reward]) => reward)));
const outcomes = index.trees.map(({ rewards }) => outcome(rewards, rewardRange));
const state = {
  current: 0, // number of the tree in the first pane
  numbers: [], // of the trees that are listed
  filter: "all",
  query: "",
  found: null, // tree number -> leaves with the query; null without a query
  colour: rewardRange[0] <= rewardRange[1] ? "value" : "logprob",
  active: 0,
  panes: [], // { number, tree, node, box, element }
  tickets: { search: 0, open: 0 }, // the last of each: what comes later than another was asked for is dropped
};
const byId = (id) => document.getElementById(id);
const list = new List(byId("list"), listRow);

// The list

function listRow(item) {
  const row = make("div", item.head ? "row step" : "row");
  const bar = make("div", "bar");
  const rewards = item.head ? mergedRewards(item.summaries) : index.trees[item.number].rewards;
  bar.style.backgroundImage = rewardGradient(rewards, rewardRange);
  if (item.head) {
    const mean = make("span", "quiet", `mean reward ${shownNumber(meanReward(rewards))}`);
    row.append(make("div", "", make("span", "", item.head), mean), bar);
    return row;
  }
  const summary = index.trees[item.number];
  row.title = `${summary.leaves} leaves, ${summary.tokens} tokens, mean reward ${shownNumber(meanReward(rewards))}`;
  row.dataset.tree = item.number;
  row.classList.toggle("current", item.number === state.current);
  row.append(make("div", "", make("span", "quiet", `#${summary.number} `), summary.prompt), bar);
  row.addEventListener("click", () => open(item.number));
  return row;
}

function updateList() {
  const isListed = (number) =>
    (state.filter === "all" || outcomes[number] === state.filter) && (!state.found || state.found.has(number));
  state.numbers = [...index.trees.keys()].filter(isListed);
  list.set(listItems(index, state.numbers));
}

function showCount(progress = "") {
  byId("count").textContent = `${state.numbers.length} of ${index.trees.length} prompts${progress}`;
}

function setFilter(filter) {
  state.filter = filter;
  press(byId("filters"), filter);
  updateList();
  showCount();
}

async function search(query) {
  const ticket = ++state.tickets.search;
  state.query = query;
  state.found = query ? new Map() : null;
  let pause = performance.now() + 30;
  for (let number = 0; query && number < index.trees.length; number++) {
    const leaves = leavesWith(await readTree(number), query);
    if (ticket !== state.tickets.search) return;
    if (leaves.length) state.found.set(number, leaves);
    if (performance.now() < pause) continue;
    updateList();
    showCount(`, ${number + 1} searched`);
    await new Promise((resume) => setTimeout(resume));
    pause = performance.now() + 30;
  }
  if (ticket !== state.tickets.search) return;
  updateList();
  showCount();
  if (state.numbers.length) open(state.numbers.includes(state.current) ? state.current : state.numbers[0]);
}

// The trees

/** The tree of the other run or step that belongs to a tree: the same prompt, else the same place. */
function counterpart(number, choice) {
  const summary = index.trees[number];
  const [source, step] = choice.split(":").map((part) => (part === "" ? summary.step : Number(part)));
  const candidates = [...index.trees.keys()].filter((other) => index.trees[other].source === source);
  const ofStep = candidates.filter((other) => step === null || index.trees[other].step === step);
  const same = (other) => index.trees[other].key === summary.key;
  const isThere = (other) => index.trees[other].number === summary.number;
  return ofStep.find(same) ?? candidates.find(same) ?? ofStep.find(isThere) ?? ofStep[0] ?? candidates[0];
}

async function open(number) {
  const ticket = ++state.tickets.open;
  const choice = byId("beside").value;
  const numbers = choice ? [number, counterpart(number, choice)] : [number];
  const trees = await Promise.all(numbers.map(loadTree));
  if (ticket !== state.tickets.open) return;
  state.current = number;
  state.panes.forEach((pane, i) => {
    pane.element.hidden = i >= trees.length;
    Object.assign(pane, { number: numbers[i], tree: trees[i], node: trees[i] && firstLeaf(numbers[i], trees[i]) });
  });
  state.active = Math.min(state.active, trees.length - 1);
  const item = list.items.findIndex((each) => each.number === number);
  list.show(Math.max(0, item));
  draw();
  performance.mark("tree"); // for benchmarks and a browser's own tools
  requestAnimationFrame(() => setTimeout(loadNeighbours));
}

/** Reads the trees of the next and the previous prompt, so that they are there when they are asked for. */
function loadNeighbours() {
  const at = state.numbers.indexOf(state.current);
  const numbers = [state.numbers[at + 1], state.numbers[at - 1]].filter(isKnown);
  for (const number of numbers) loadTree(number).catch(() => {}); // it is tried again, and said, when it is opened
}

function firstLeaf(number, tree) {
  const leaves = tree.nodes.filter((node) => !node.children.length).sort((a, b) => a.row - b.row);
  const found = state.found?.get(number) ?? [];
  return leaves.find((leaf) => found.includes(leaf.id)) ?? leaves[0];
}

function openPanes() {
  return state.panes.filter((pane) => pane.tree);
}

function draw() {
  const panes = openPanes();
  if (!panes.length) return;
  const trees = panes.map((pane) => pane.tree);
  state.painter = painter(state.colour, trees, rewardRange);
  const end = Math.max(...trees.map((tree) => tree.end));
  for (const pane of panes) {
    const summary = index.trees[pane.number];
    const rewards = `mean reward ${shownNumber(meanReward(summary.rewards))}`;
    const isOther = summary.key !== index.trees[state.current].key ? " · another prompt" : "";
    pane.title = `${treeName(index, summary)}${isOther}`;
    pane.element.querySelector("h2").textContent = `${pane.title} · ${summary.leaves} leaves · ${rewards}`;
    drawTree(pane.box, pane.tree, end, state.painter.colourOf, new Set(state.found?.get(pane.number)));
    if (pane !== panes[state.active]) markPath(pane.tree, pane.node);
  }
  drawLegend();
  select(state.active, panes[state.active].node);
}

function drawLegend() {
  const { range, paint } = state.painter;
  const { explained } = COLOURS[state.colour];
  if (!range) {
    byId("legend").replaceChildren(`${explained}: not in this log`);
    return;
  }
  const bar = make("i");
  bar.style.backgroundImage = `linear-gradient(90deg, ${[0, 0.5, 1].map(paint).join(", ")})`;
  const [low, high] = range.map((value) => make("span", "", shownNumber(value)));
  byId("legend").replaceChildren(low, bar, high, make("span", "", explained));
}

function select(active, node) {
  const pane = state.panes[active];
  state.active = active;
  pane.node = node;
  state.panes.forEach((each, i) => each.element.classList.toggle("active", i === active && openPanes().length > 1));
  markPath(pane.tree, node);
  const onPick = (picked) => select(active, picked);
  showPath(byId("path"), pane.title, pane.tree, node, state.painter.colourOf, state.query, index.is_text, onPick);
}

// Controls

function press(group, name) {
  for (const button of group.children) button.setAttribute("aria-pressed", button.dataset.name === name);
}

function addButtons(group, names, onPress) {
  for (const [name, text] of Object.entries(names)) {
    const button = make("button", "", text);
    button.dataset.name = name;
    button.addEventListener("click", () => onPress(name));
    group.append(button);
  }
}

function setColour(colour) {
  state.colour = colour;
  press(byId("colours"), colour);
  draw();
}

/** Choices of what is drawn beside a tree: "source:step", or "source:" for the step of the tree. */
function addChoices(select) {
  select.append(new Option("nothing", ""));
  if (index.sources.length > 1) index.sources.forEach((name, i) => select.append(new Option(name, `${i}:`)));
  const seen = new Set();
  for (const summary of index.trees) {
    const value = `${summary.source}:${summary.step}`;
    if (summary.step === null || seen.has(value)) continue;
    seen.add(value);
    select.append(new Option(groupName(index, summary), value));
  }
  if (index.sources.length === 2) select.value = "1:";
}

function makePane(i) {
  const box = make("div", "drawing");
  const element = make("section", "pane", make("h2"), box);
  element.hidden = i > 0;
  box.addEventListener("click", (event) => {
    const id = event.target.dataset?.node;
    if (id !== undefined) select(i, state.panes[i].tree.nodes[id]);
  });
  byId("panes").append(element);
  return { box, element, tree: null, node: null, number: null };
}

function step(by) {
  const at = state.numbers.indexOf(state.current);
  const next = state.numbers[at < 0 ? 0 : at + by];
  if (next !== undefined) open(next);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !openPanes().length) return;
  if (event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement) {
    if (event.key === "Escape" || event.key === "Enter") event.target.blur();
    return;
  }
  const pane = state.panes[state.active];
  const other = openPanes().length - 1 - state.active;
  const colour = Object.keys(COLOURS)[Number(event.key) - 1];
  if (event.key.startsWith("Arrow")) select(state.active, neighbour(pane.tree, pane.node, event.key));
  else if (event.key === "n" || event.key === "PageDown") step(1);
  else if (event.key === "p" || event.key === "PageUp") step(-1);
  else if (event.key === "x") select(other, state.panes[other].node);
  else if (event.key === "/") byId("search").focus();
  else if (colour) setColour(colour);
  else return;
  event.preventDefault();
}

function start() {
  document.title = `Trees of ${index.sources.join(" and ")}`;
  state.panes = [makePane(0), makePane(1)];
  addButtons(byId("filters"), FILTERS, setFilter);
  addButtons(byId("colours"), { value: "value", advantage: "advantage", entropy: "entropy", logprob: "log-probability" }, setColour);
  addChoices(byId("beside"));
  byId("beside").addEventListener("change", () => open(state.current));
  let waiting;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => search(event.target.value.trim().toLowerCase()), SEARCH_DELAY);
  });
  document.addEventListener("keydown", onKey);
  new ResizeObserver(draw).observe(byId("panes"));
  setFilter("all");
  press(byId("colours"), state.colour);
  open(0);
}

window.addEventListener("unhandledrejection", (event) => {
  byId("count").textContent = `A tree cannot be read: ${event.reason.message}.`;
});
start();
