/* Steps and prompts. Only the rows in view are elements, so that their number does not matter. */

const ROW_HEIGHT = 46;
const ROWS_AROUND = 6;

class List {
  /** `draw` makes the element of an item. */
  constructor(box, draw) {
    this.box = box;
    this.draw = draw;
    this.items = [];
    this.room = make("div");
    box.append(this.room);
    box.addEventListener("scroll", () => this.render());
    new ResizeObserver(() => this.render()).observe(box);
  }

  set(items) {
    this.items = items;
    this.room.style.height = `${items.length * ROW_HEIGHT}px`;
    this.render();
  }

  render() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - ROWS_AROUND);
    const count = Math.ceil(this.box.clientHeight / ROW_HEIGHT) + 2 * ROWS_AROUND;
    const rows = this.items.slice(first, first + count).map((item, i) => {
      const row = this.draw(item);
      row.style.top = `${(first + i) * ROW_HEIGHT}px`;
      return row;
    });
    this.room.replaceChildren(...rows);
  }

  show(position) {
    const top = position * ROW_HEIGHT;
    const { scrollTop, clientHeight } = this.box;
    if (top < scrollTop) this.box.scrollTop = Math.max(0, top - ROW_HEIGHT);
    else if (top + ROW_HEIGHT > scrollTop + clientHeight) this.box.scrollTop = top + 2 * ROW_HEIGHT - clientHeight;
    this.render();
  }
}

/** Where a tree is from: its step, and its run if there are several. */
function groupName(index, { source, step }) {
  const parts = step === null ? [] : [`step ${step}`];
  if (index.sources.length > 1) parts.push(index.sources[source]);
  return parts.join(" · ") || "prompts";
}

function treeName(index, summary) {
  return `${groupName(index, summary)} · prompt ${summary.number}`;
}

/** Rewards of several trees as those of one. */
function mergedRewards(summaries) {
  const counts = new Map();
  for (const { rewards } of summaries) {
    for (const [reward, count] of rewards) counts.set(reward, (counts.get(reward) ?? 0) + count);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

function meanReward(rewards) {
  const total = rewards.reduce((sum, [, count]) => sum + count, 0);
  return total ? rewards.reduce((sum, [reward, count]) => sum + reward * count, 0) / total : undefined;
}

/** Mixed: the leaves have different rewards. Else all are right or wrong, by the middle of the log's rewards. */
function outcome(rewards, [low, high]) {
  if (!rewards.length) return "unscored";
  if (rewards.length > 1) return "mixed";
  return rewards[0][0] > (high > low ? (low + high) / 2 : 0) ? "right" : "wrong";
}

/** Items of the list: a head for each step, then its trees. */
function listItems(index, numbers) {
  const items = [];
  let head = null;
  for (const number of numbers) {
    const summary = index.trees[number];
    const group = groupName(index, summary);
    if (head?.head !== group) items.push((head = { head: group, summaries: [] }));
    head.summaries.push(summary);
    items.push({ number });
  }
  return items;
}
