/* What the colour of a segment says. Blue and orange differ for people who see few colours too. */

const LOW = [217, 112, 20];
const MIDDLE = [205, 208, 212];
const HIGH = [37, 99, 205];
const PALE = [222, 230, 240];
const UNKNOWN = "rgb(150 150 150 / 25%)";

function blend(from, to, share) {
  return `rgb(${from.map((part, i) => Math.round(part + (to[i] - part) * share)).join(" ")})`;
}

/** Orange at 0, grey at 1/2, blue at 1. */
function diverging(share) {
  return share < 0.5 ? blend(LOW, MIDDLE, share * 2) : blend(MIDDLE, HIGH, share * 2 - 1);
}

function sequential(share) {
  return blend(PALE, HIGH, share);
}

/* `range` gives the lowest and the highest value that the colours reach from, of trees that are drawn together. */
const COLOURS = {
  value: {
    explained: "mean reward of the leaves below",
    paint: diverging,
    range: (values, rewardRange) => rewardRange,
  },
  advantage: {
    explained: "advantage of a leaf's last segment; the mean of them above",
    paint: diverging,
    range: (values) => {
      const largest = extent(values.map(Math.abs))[1];
      return [-largest, largest];
    },
  },
  entropy: { explained: "mean entropy of the tokens, in nats", paint: sequential, range: extent },
  logprob: { explained: "mean log-probability of the tokens", paint: sequential, range: extent },
};

/** Lowest and highest; an empty range, from infinity down, if there is no value. */
function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  return [low, high];
}

/** What paints the nodes of trees: the range, and a function from a node to its colour. */
function painter(name, trees, rewardRange) {
  const { paint, range } = COLOURS[name];
  const values = trees.flatMap((tree) => tree.nodes.map((node) => node[name])).filter((value) => value !== undefined);
  if (!values.length) return { range: null, paint, colourOf: () => UNKNOWN };
  const [low, high] = range(values, rewardRange);
  const share = (value) => (high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : 0.5);
  const colourOf = (node) => (node[name] === undefined ? UNKNOWN : paint(share(node[name])));
  return { range: [low, high], paint, colourOf };
}

/** A bar with a stripe for each reward, as wide as its leaves are many. */
function rewardGradient(rewards, [low, high]) {
  const total = rewards.reduce((sum, [, count]) => sum + count, 0);
  if (!total) return "none";
  let done = 0;
  const stops = rewards.map(([reward, count]) => {
    const colour = diverging(high > low ? (reward - low) / (high - low) : 0.5);
    const start = (100 * done) / total;
    done += count;
    return `${colour} ${start}% ${(100 * done) / total}%`;
  });
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

function shownNumber(value) {
  return value === undefined || value === null ? "-" : String(Number(value.toFixed(3)));
}
