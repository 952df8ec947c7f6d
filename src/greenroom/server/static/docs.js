// Shows the OpenAPI document: each route with the fields of its body.

const box = document.getElementById("docs");

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
}

function typeOf(schema) {
  if (!schema) return "any";
  if (schema.$ref) return schema.$ref.split("/").pop().split("__").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return [...new Set(options.map(typeOf))].join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items)}`;
  return schema.type ?? "any";
}

function fields(schema) {
  const table = element("table", "");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const row = table.insertRow();
    const needed = schema.required?.includes(name) ? " (needed)" : "";
    row.append(element("th", name), element("td", typeOf(field) + needed));
    row.append(element("td", field.description ?? ""));
  }
  return table;
}

function route(path, method, entry, schemas) {
  const details = element("details", "");
  details.append(element("summary", `${method.toUpperCase()} ${path}`));
  details.append(element("p", entry.description ?? ""));
  const reference = entry.requestBody?.content["application/json"]?.schema.$ref;
  if (reference) details.append(fields(schemas[reference.split("/").pop()]));
  return details;
}

const api = await (await fetch("/openapi.json")).json();
const groups = {};
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, entry] of Object.entries(methods)) {
    const group = entry.tags?.[0] ?? "Other";
    (groups[group] ??= []).push(route(path, method, entry, api.components.schemas));
  }
}
box.replaceChildren();
for (const [name, routes] of Object.entries(groups)) box.append(element("h2", name), ...routes);
