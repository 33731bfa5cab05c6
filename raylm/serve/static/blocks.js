// Shows a growing text as paragraphs and fenced code. Every character the model wrote, but the fences, is kept as text.

import { element, setText } from "./dom.js";

const FENCE = /^ {0,3}```\s*([\w+#.-]*)\s*$/;

/** Split text into `{kind: "text" | "code", text, language}`. A fence that is not closed yet runs to the end. */
export function parseBlocks(text) {
  const blocks = [];
  let lines = [];
  let code = null;
  const flush = (kind, language = "") => {
    const joined = lines.join("\n");
    if (kind === "code" || joined.trim()) blocks.push({ kind, language, text: joined });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    if (code === null && fence) {
      flush("text");
      code = fence[1];
    } else if (code !== null && fence && !fence[1]) {
      flush("code", code);
      code = null;
    } else if (code === null && line.trim() === "") {
      flush("text");
    } else {
      lines.push(line);
    }
  }
  if (code !== null) flush("code", code);
  else flush("text");
  return blocks;
}

/** Render text into an element, touching only the blocks that changed. */
export function renderBlocks(parent, text) {
  const blocks = parseBlocks(text);
  blocks.forEach((block, index) => {
    let node = parent.children[index];
    if (node?.dataset.kind !== block.kind) {
      const fresh =
        block.kind === "code"
          ? element("pre", { "data-kind": "code", tabindex: "0" }, element("code"))
          : element("p", { "data-kind": "text" });
      if (node) node.replaceWith(fresh);
      else parent.append(fresh);
      node = fresh;
    }
    if (block.kind === "code") {
      node.setAttribute("aria-label", block.language ? `${block.language} code` : "code");
      setText(node.firstElementChild, block.text);
    } else {
      setText(node, block.text);
    }
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}
