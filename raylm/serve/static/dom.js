// Elements without markup in strings: whatever a model or a server says goes in as text.

/**
 * Create an element.
 * @param {string} tag
 * @param {Object<string, string|boolean|Function>} attributes  A function is a listener, named by its event.
 * @param {...(Node|string)} children
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Set an element's text, leaving the DOM alone when it is that already: a selection in it survives. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Make a parent's children those of `items`, in order, keeping the element of each key.
 * @param {Element} parent
 * @param {Array} items
 * @param {function(*): string} keyOf
 * @param {function(*): {element: Element, show: function(*)}} create
 * @param {Map<string, {element: Element, show: function(*)}>} views  What this function made before, by key.
 */
export function reconcile(parent, items, keyOf, create, views) {
  const keys = new Set(items.map(keyOf));
  for (const [key, view] of views) {
    if (keys.has(key)) continue;
    view.element.remove();
    views.delete(key);
  }
  items.forEach((item, index) => {
    const key = keyOf(item);
    if (!views.has(key)) views.set(key, create(item));
    const view = views.get(key);
    if (parent.children[index] !== view.element) parent.insertBefore(view.element, parent.children[index] ?? null);
    view.show(item);
  });
}
