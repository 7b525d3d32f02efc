/* A tree from left to right: a segment is as long as its tokens are many and as high as it has leaves below. */

const SVG = "http://www.w3.org/2000/svg";
const PROMPT_WIDTH = 18;
const LABEL_WIDTH = 110;
const GAP = 1;

/** Adds to each node what follows from the tree: children, leaves below, place, and values of inner nodes. */
function layOut(tree) {
  const roots = [];
  tree.nodes.forEach((node, id) => {
    const parent = tree.nodes[node.parent];
    Object.assign(node, { id, children: [], start: parent ? parent.end : 0, depth: parent ? parent.depth + 1 : 0 });
    node.end = node.start + node.tokens;
    (parent ? parent.children : roots).push(node);
  });
  for (const node of tree.nodes.toReversed()) {
    node.leaves = node.children.reduce((sum, child) => sum + child.leaves, 0) || 1;
    node.rewards = node.children.length ? node.children.flatMap((child) => child.rewards) : [node.reward].filter(isKnown);
    node.value = mean(node.rewards);
    if (node.children.length) node.advantages = node.children.flatMap((child) => child.advantages);
    else node.advantages = [node.advantage].filter(isKnown);
    node.advantage = mean(node.advantages);
  }
  placeRows(roots);
  tree.roots = roots;
  tree.leaves = roots.reduce((sum, node) => sum + node.leaves, 0);
  tree.end = Math.max(...tree.nodes.map((node) => node.end));
  return tree;
}

function isKnown(value) {
  return value !== undefined;
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : undefined;
}

/** `row`: how many leaves lie above a node. */
function placeRows(siblings, first = 0) {
  let row = first;
  for (const node of siblings) {
    node.row = row;
    placeRows(node.children, row);
    row += node.leaves;
  }
}

function pathTo(tree, node) {
  const path = [];
  for (let each = node; each; each = tree.nodes[each.parent]) path.unshift(each);
  return path;
}

/** The node that an arrow leads to; the same one where there is none. */
function neighbour(tree, node, key) {
  if (key === "ArrowLeft") return tree.nodes[node.parent] ?? node;
  if (key === "ArrowRight") return node.children[0] ?? node;
  const beside = tree.nodes.filter((each) => each.depth === node.depth).sort((a, b) => a.row - b.row);
  return beside[beside.indexOf(node) + (key === "ArrowDown" ? 1 : -1)] ?? node;
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Draws a tree into a box; tokens up to `end` have room. */
function drawTree(box, tree, end, colourOf, found) {
  const unit = Math.min(48, Math.max(9, Math.floor((box.clientHeight - 4) / tree.leaves)));
  const width = Math.max(360, box.clientWidth - 4);
  const perToken = (width - PROMPT_WIDTH - LABEL_WIDTH) / end;
  const svg = shape("svg", { width, height: unit * tree.leaves, role: "img", "aria-label": "Tree of the segments" });
  svg.append(shape("rect", { class: "prompt", x: 0, y: 0, width: PROMPT_WIDTH - 2, height: unit * tree.leaves - GAP }));
  for (const node of tree.nodes) {
    const classes = ["node"];
    if (node.wave) classes.push("fallback");
    if (node.is_sampled === false) classes.push("given");
    if (found.has(node.id)) classes.push("found");
    const rect = shape("rect", {
      class: classes.join(" "),
      x: PROMPT_WIDTH + node.start * perToken,
      y: node.row * unit,
      width: Math.max(1, node.tokens * perToken - GAP),
      height: node.leaves * unit - GAP,
      rx: 2,
      fill: colourOf(node),
      "data-node": node.id,
    });
    node.rect = rect;
    svg.append(rect);
    if (!node.children.length) svg.append(leafLabel(node, PROMPT_WIDTH + node.end * perToken + 4, unit));
  }
  box.replaceChildren(svg);
}

function leafLabel(node, x, unit) {
  const label = shape("text", { x, y: (node.row + 0.5) * unit + 3 });
  label.textContent = [node.reward, node.finish].filter(isKnown).join(" ");
  return label;
}

/** Marks the path to a node in a drawn tree and brings the node into view. */
function markPath(tree, node) {
  for (const each of tree.marked ?? []) each.rect.classList.remove("on-path", "selected");
  tree.marked = pathTo(tree, node);
  for (const each of tree.marked) each.rect.classList.add("on-path");
  node.rect.classList.add("selected");
  node.rect.scrollIntoView({ block: "nearest", inline: "nearest" });
}
