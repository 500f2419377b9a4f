// openapi.json as a page. Everything is put in as text, never as HTML.

const main = document.getElementById('docs');
const METHODS = ['get', 'post', 'put', 'delete'];

function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== ''));
  return element;
}

/** Return the text with what stands between back quotes as code. */
const prose = (text) => h('p', {}, text.split('`').map((part, place) => (place % 2 ? h('code', {}, part) : part)));

function kind(schema) {
  if (!schema) return '';
  if (schema.$ref) { const name = schema.$ref.split('/').pop(); return h('a', { href: `#${name}` }, name); }
  if (schema.anyOf) return schema.anyOf.filter((option) => option.type !== 'null').flatMap((option, place) => [place ? ' or ' : '', kind(option)]).flat();
  if (schema.type === 'array') return ['list of ', kind(schema.items)].flat();
  if (schema.enum) return schema.enum.join(', ');
  if (schema.contentMediaType || schema.format === 'binary') return 'file';
  return schema.type || 'any';
}

function range(schema) {
  const found = schema.anyOf ? Object.assign({}, ...schema.anyOf) : schema;
  const parts = [];
  if (found.minimum !== undefined || found.exclusiveMinimum !== undefined) parts.push(`from ${found.minimum ?? found.exclusiveMinimum}`);
  if (found.maximum !== undefined) parts.push(`to ${found.maximum}`);
  if (found.maxLength !== undefined) parts.push(`at most ${found.maxLength} characters`);
  if (schema.default !== undefined && schema.default !== null && schema.default !== '') parts.push(`default ${schema.default}`);
  return parts.join(' ');
}

function table(rows, label) {
  const head = ['name', 'kind', 'values', 'meaning'].map((name) => h('th', { scope: 'col' }, name));
  const body = rows.map(([name, schema, meaning]) => h('tr', {}, h('th', { scope: 'row' }, h('code', {}, name)), h('td', {}, kind(schema)), h('td', {}, range(schema)), h('td', {}, meaning || '')));
  return h('div', { className: 'scroll', tabIndex: 0, role: 'region', 'aria-label': label }, h('table', {}, h('thead', {}, h('tr', {}, head)), h('tbody', {}, body)));
}

const fields = (schema) => Object.entries(schema.properties || {}).map(([name, inner]) => [name, inner, inner.description]);

function curl(method, path, spec, body) {
  const address = `${location.origin}${new URL('.', location.href).pathname.replace(/\/$/, '')}${path}`.replace('{index}', 'INDEX').replace('{picture_id}', '1');
  if (body['multipart/form-data']) return `curl '${address}' -F picture=@shirt.jpg -F 'text=with longer sleeves' -F k=5`;
  if (body['application/json']) return `curl '${address}' --json '{"token": "TOKEN"}'`;
  return `curl '${address}'`;
}

function operation(method, path, spec, schemas) {
  const body = spec.requestBody ? spec.requestBody.content : {};
  const form = Object.values(body)[0];
  const resolved = form && form.schema.$ref ? schemas[form.schema.$ref.split('/').pop()] : form && form.schema;
  const answer = (spec.responses['200'] || {}).content || {};
  const [type, content] = Object.entries(answer)[0] || ['', {}];
  const parameters = (spec.parameters || []).map((item) => [item.name, item.schema, item.description || item.schema.description]);
  return h('details', { className: 'operation', open: path.endsWith('/search') },
    h('summary', {}, h('span', { className: 'method' }, method.toUpperCase()), h('code', {}, path), h('span', {}, spec.description || '')),
    parameters.length ? [h('h3', {}, 'In the address'), table(parameters, `${method} ${path}: address`)] : null,
    resolved ? [h('h3', {}, `Body: ${Object.keys(body)[0]}`), table(fields(resolved), `${method} ${path}: body`)] : null,
    h('h3', {}, 'Answer'), h('p', {}, type === 'application/json' ? kind(content.schema) : type),
    h('h3', {}, 'For example'), h('pre', { tabIndex: 0 }, curl(method, path, spec, body)));
}

try {
  const response = await fetch('openapi.json');
  if (!response.ok) throw new Error(`the server answered with ${response.status}`);
  const spec = await response.json();
  const schemas = spec.components.schemas;
  const operations = Object.entries(spec.paths).flatMap(([path, item]) => METHODS.filter((method) => item[method]).map((method) => operation(method, path, item[method], schemas)));
  const shown = Object.entries(schemas).filter(([name]) => !name.startsWith('Body_') && !name.includes('Validation'));
  main.replaceChildren(h('h1', {}, `${spec.info.title} ${spec.info.version}`), prose(spec.info.description),
    h('p', {}, 'Machines read ', h('a', { href: 'openapi.json' }, 'openapi.json'), '.'),
    h('h2', {}, 'Requests'), ...operations, h('h2', {}, 'Types'),
    ...shown.flatMap(([name, schema]) => [h('h3', { id: name }, name), schema.description ? prose(schema.description) : '', schema.enum ? h('p', {}, schema.enum.join(', ')) : table(fields(schema), name)].filter(Boolean)));
} catch (error) {
  main.replaceChildren(h('div', { className: 'trouble', role: 'alert' }, h('p', {}, `openapi.json cannot be read: ${error.message}.`)));
}
