"use strict";

/* Index and trees as the command packs them: JSON in gzip, in base64 in the page or as bytes from the page's server. */

const MAX_TREES_IN_MEMORY = 64;
const treesInMemory = new Map(); // number of a tree -> promise of it, the least recently used first

function bytesOf(element) {
  const text = atob(element.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function loadIndex() {
  return JSON.parse(new TextDecoder().decode(bytesOf(document.getElementById("index"))));
}

async function packedTree(number) {
  const element = document.getElementById(`tree-${number}`);
  if (element) return bytesOf(element);
  const response = await fetch(`tree/${number}`);
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  return response.arrayBuffer();
}

/** A tree as it is packed: its prompt and nodes. */
async function readTree(number) {
  const stream = new Blob([await packedTree(number)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** A tree that is laid out, from memory if it is there. */
function loadTree(number) {
  const tree = treesInMemory.get(number) ?? readTree(number).then(layOut);
  treesInMemory.delete(number);
  treesInMemory.set(number, tree);
  tree.catch(() => treesInMemory.delete(number)); // another try asks the server again
  if (treesInMemory.size > MAX_TREES_IN_MEMORY) treesInMemory.delete(treesInMemory.keys().next().value);
  return tree;
}

/** Texts of the completions of a tree: node id of a leaf and its text. */
function completions(tree) {
  const paths = [];
  const found = [];
  tree.nodes.forEach((node, id) => {
    paths[id] = (node.parent === null ? "" : paths[node.parent]) + node.text;
    if (node.finish) found.push([id, paths[id] + (node.completion ?? "")]);
  });
  return found;
}

/** Node ids of the leaves whose completion holds a text in small letters; all if the prompt holds it. */
function leavesWith(tree, text) {
  const all = completions(tree);
  if (tree.prompt.toLowerCase().includes(text)) return all.map(([id]) => id);
  return all.filter(([, completion]) => completion.toLowerCase().includes(text)).map(([id]) => id);
}
