/* The text of a path, segment by segment. Texts go in as text nodes alone: nothing in them becomes markup. */

const ENDS = {
  stop: "an end token",
  pattern: "the stop pattern",
  repetition: "it repeats itself",
  length: "the cap on its length, or on the tree's tokens",
  turns: "a call too many",
  overlong: "an answer that does not fit",
  timeout: "a call that took too long",
};

function make(name, className, ...content) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...content);
  return element;
}

/** A text with each place of a query marked. */
function marked(text, query) {
  const pre = make("pre");
  const small = text.toLowerCase();
  let done = 0;
  // Some capital letters have small ones of another length; places would be wrong then.
  if (query && small.length === text.length) {
    for (let at = small.indexOf(query); at >= 0; at = small.indexOf(query, done)) {
      pre.append(text.slice(done, at), make("mark", "", text.slice(at, at + query.length)));
      done = at + query.length;
    }
  }
  pre.append(text.slice(done));
  return pre;
}

function facts(node) {
  const found = [`${node.tokens} tokens`];
  if (node.children.length) found.push(`${node.leaves} ${node.leaves === 1 ? "leaf" : "leaves"} below`);
  if (isKnown(node.value)) found.push(`${node.children.length ? "value" : "reward"} ${shownNumber(node.value)}`);
  if (isKnown(node.advantage)) found.push(`${node.children.length ? "mean " : ""}advantage ${shownNumber(node.advantage)}`);
  if (isKnown(node.weight)) found.push(`weight ${shownNumber(node.weight)}`);
  if (isKnown(node.entropy)) found.push(`entropy ${shownNumber(node.entropy)}`);
  if (isKnown(node.logprob)) found.push(`log-probability ${shownNumber(node.logprob)}`);
  if (node.wave) found.push(`fallback ${node.wave}`);
  if (node.is_sampled === false) found.push("not sampled: a tool's answer or another's message");
  if (node.failures) found.push(`${node.failures} failed call${node.failures === 1 ? "" : "s"}`);
  return found.join(" · ");
}

function ending(node) {
  if (node.finish) return `Ended: ${node.finish} (${ENDS[node.finish] ?? "see the log"}).`;
  return `Goes on in ${node.children.length} segment${node.children.length === 1 ? "" : "s"}.`;
}

/** Shows a path; `onPick` is called with the node of a segment that is clicked. */
function showPath(box, title, tree, node, colourOf, query, isText, onPick) {
  const parts = [make("h3", "", title)];
  if (!isText) {
    parts.push(make("p", "quiet no-text", "No tokenizer was found, so segments are token ids. Name it with --tokenizer."));
  }
  parts.push(make("div", "segment prompt-text", make("div", "quiet", "prompt"), marked(tree.prompt, query)));
  for (const each of pathTo(tree, node)) {
    const name = `segment ${each.depth + 1} · ${facts(each)}`;
    const part = make("div", "segment", make("div", "quiet", name), marked(each.text, query));
    for (const call of each.calls ?? []) part.append(make("div", "quiet", "calls"), marked(call, query));
    for (const answer of each.answers ?? []) part.append(make("div", "quiet", "message"), marked(answer, query));
    part.style.borderLeftColor = colourOf(each);
    if (each === node) part.classList.add("selected");
    part.addEventListener("click", () => onPick(each));
    parts.push(part);
  }
  if (node.completion) parts.push(make("div", "segment", make("div", "quiet", "completion"), marked(node.completion, query)));
  parts.push(make("p", "end", ending(node)));
  box.replaceChildren(...parts);
  box.querySelector(".selected").scrollIntoView({ block: "nearest" });
}
