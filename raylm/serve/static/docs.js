// Shows openapi.json: each route with its fields, an example and its answers.

import { getJson } from "./api.js";
import { element } from "./dom.js";

const contents = document.getElementById("contents");
const routes = document.getElementById("routes");

/** Return the schema that a reference means, or the schema itself. */
function resolved(api, schema) {
  const name = schema.$ref?.split("/").pop();
  return name ? api.components.schemas[name] : schema;
}

/** Return what a schema takes, in a few words. */
function typeName(api, schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return [...new Set(choices.map((choice) => typeName(api, choice)))].join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return `list of ${typeName(api, schema.items ?? {})}`;
  const least = schema.minimum ?? (schema.exclusiveMinimum === undefined ? undefined : `>${schema.exclusiveMinimum}`);
  const most = schema.maximum > 1e15 ? undefined : schema.maximum;
  const limits = least === undefined && most === undefined ? "" : ` (${least ?? ""} to ${most ?? ""})`;
  return `${schema.type ?? "anything"}${limits.replace(" to )", " and more)")}`;
}

function fieldRow(api, name, schema, required) {
  const about = [schema.description ?? ""];
  if (required) about.unshift("Required.");
  else if (schema.default !== undefined && schema.default !== null) about.push(`Default: ${JSON.stringify(schema.default)}.`);
  return element(
    "tr",
    {},
    element("td", {}, name),
    element("td", {}, typeName(api, schema)),
    element("td", {}, about.join(" ")),
  );
}

function table(api, fields) {
  return element("table", {}, element("tbody", {}, ...fields.map((field) => fieldRow(api, ...field))));
}

/** Return `[name, schema, required]` of each field of an object. */
function fieldsOf(schema) {
  const required = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {}).map(([name, field]) => [name, field, required.has(name)]);
}

/** Quote for a shell. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function curl(api, method, path, body) {
  const url = new URL(path.replaceAll(/[{}]/g, ""), location.href).href;
  const parts = [`curl ${method === "GET" ? "" : `-X ${method} `}${quoted(url)}`];
  parts.push(`-H "Authorization: Bearer $KEY"`);
  const example = body?.examples?.[0];
  if (example) parts.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(example))}`);
  return parts.join(" \\\n  ");
}

function article(api, method, path, operation) {
  const parts = [];
  const parameters = operation.parameters ?? [];
  if (parameters.length) {
    const fields = parameters.map(({ name, schema, description, required }) => [name, { description, ...schema }, required]);
    parts.push(element("h3", {}, "Parameters"), table(api, fields));
  }
  const taken = operation.requestBody?.content["application/json"]?.schema;
  const body = taken && resolved(api, taken);
  if (body) parts.push(element("h3", {}, "Body"), table(api, fieldsOf(body)));
  parts.push(element("h3", {}, "Example"), element("pre", {}, curl(api, method, path, body)));
  const answers = Object.entries(operation.responses).map(([status, { description, content = {} }]) => {
    const kinds = Object.entries(content).map(([media, { schema }]) => `${media}: ${typeName(api, schema)}`);
    return element(
      "tr",
      {},
      element("td", {}, status),
      element("td", {}, kinds.join("; ")),
      element("td", {}, description),
    );
  });
  parts.push(element("h3", {}, "Answers"), element("table", {}, element("tbody", {}, ...answers)));
  return element(
    "article",
    { id: operation.operationId },
    element("h2", {}, element("span", { class: "method" }, method), ` ${path}`),
    element("p", {}, operation.description ?? operation.summary ?? ""),
    ...parts,
  );
}

/** The objects that fields and answers name. */
function objects(api) {
  return Object.entries(api.components.schemas)
    .filter(([name, schema]) => schema.properties && !name.endsWith("Body"))
    .map(([name, schema]) =>
      element(
        "article",
        { id: name },
        element("h2", {}, name),
        element("p", {}, schema.description?.split("\n\n")[0] ?? ""),
        table(api, fieldsOf(schema)),
      ),
    );
}

function show(api) {
  document.getElementById("version").textContent = `API, version ${api.info.version}`;
  const tags = new Map();
  const articles = [];
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const [tag] = operation.tags ?? ["other"];
      const link = element("a", { href: `#${operation.operationId}` }, `${method.toUpperCase()} ${path}`);
      if (!tags.has(tag)) tags.set(tag, []);
      tags.get(tag).push(element("li", {}, link));
      articles.push(article(api, method.toUpperCase(), path, operation));
    }
  }
  for (const [tag, links] of tags) contents.append(element("h2", {}, tag), element("ul", {}, ...links));
  routes.replaceChildren(...articles, ...objects(api));
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

try {
  show(await getJson("openapi.json"));
} catch (error) {
  document.getElementById("message").textContent = error.message;
}
