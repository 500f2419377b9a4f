// The page over the HTTP API beside it. Everything that comes from the server is put in as text, never as HTML.

const API = 'api/v1';
const $ = (id) => document.getElementById(id);
const MOST_PAST = 30;

/** The server's own description; references; answers by the name of their index; what was asked; whether the token was taken. */
const state = { server: null, refs: [], answers: {}, asked: null, past: [], running: null, signedIn: false };

// -- small things ---------------------------------------------------------------------------------------------------

/** Make an element: properties, attributes with a dash or of aria, listeners by on…, children. */
function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name.includes('-') || name === 'role' || !(name in element)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ''));
  return element;
}

const fileName = (path) => path.split(/[\\/]/).pop();
const many = (count, one, more = `${one}s`) => `${count.toLocaleString('en')} ${count === 1 ? one : more}`;
const percent = (share) => (share >= 0.9995 ? '100' : (100 * share).toFixed(1));
const indexPath = (name) => `${API}/indexes/${encodeURIComponent(name)}`;
const thumbnail = (name, id, side = 320) => `${indexPath(name)}/pictures/${id}/thumbnail?side=${side}`;
const original = (name, id) => `${indexPath(name)}/pictures/${id}/file`;
const column = (name) => state.server.indexes.find((index) => index.name === name);

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: 'same-origin', ...options });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused(0, 'The server cannot be reached; see whether it still runs, then try again.');
  }
  if (response.ok) return response;
  let message = `The server answered with ${response.status}.`;
  try {
    const said = (await response.json()).error.message;
    message = said.charAt(0).toUpperCase() + said.slice(1);
  } catch { /* no sentence of its own */ }
  if (response.status === 401) askForToken();
  throw new Refused(response.status, message);
}

// -- beginning ------------------------------------------------------------------------------------------------------

async function begin() {
  try {
    const given = new URLSearchParams(location.hash.slice(1)).get('token');
    if (given) {
      history.replaceState(null, '', location.pathname);
      await signIn(given);
    }
    state.server = await (await ask(`${API}/server`)).json();
  } catch (error) {
    if (error.status !== 401) showProblem(error.message, begin);
    return;
  }
  const names = state.server.indexes.map((index) => index.name);
  $('index').replaceChildren(...state.server.indexes.map((index) => h('option', { value: index.name }, `${index.name} (${index.pictures.toLocaleString('en')})`)));
  $('second').replaceChildren(h('option', { value: '' }, 'nothing'), ...names.map((name) => h('option', { value: name }, name)));
  $('second-pick').hidden = names.length < 2;
  fillColumns();
  restorePast();
  if (!fromAddress()) showStart();
}

function askForToken() {
  state.signedIn = false;
  const dialog = $('sign-in');
  if (!dialog.open) dialog.showModal();
  $('token').focus();
}

async function signIn(token) {
  const body = JSON.stringify({ token });
  await ask(`${API}/session`, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body });
}

$('sign-in').addEventListener('cancel', (event) => event.preventDefault());
// Chromium closes a dialog on the second Escape whatever was prevented, and without a token nothing here works.
$('sign-in').addEventListener('close', () => { if (!state.signedIn) askForToken(); });
$('sign-in-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  $('sign-in-problem').textContent = '';
  try {
    await signIn($('token').value);
    state.signedIn = true;
    $('sign-in').close();
    $('token').value = '';
    clearProblem();
    begin();
  } catch (error) {
    $('sign-in-problem').textContent = error.message;
  }
});

// -- what is shown while there is no answer -------------------------------------------------------------------------

async function showStart() {
  endSearch();
  $('h-results').textContent = 'Begin';
  $('up').hidden = true;
  const samples = h('ul', { className: 'samples', 'aria-label': 'Pictures of the index' });
  $('exports').hidden = true;
  $('status').textContent = '';
  $('columns').className = '';
  $('columns').replaceChildren(h('div', { className: 'empty' },
    h('h2', {}, 'Show a picture and say what should be different'),
    h('p', {}, 'Choose, drop or paste a picture, or begin with one of these. Pictures that you upload are kept nowhere.'),
    samples));
  const name = $('index').value;
  try {
    const found = (await (await ask(`${indexPath(name)}/sample?count=16`)).json()).pictures;
    samples.replaceChildren(...found.map((picture) => h('li', {}, h('button', {
      type: 'button', title: picture.path, 'aria-label': `Use ${fileName(picture.path)} as reference`,
      onclick: () => useAsReference(name, picture),
    }, h('img', { src: thumbnail(name, picture.id, 160), alt: '', loading: 'lazy' })))));
  } catch (error) {
    if (error.status !== 401) showProblem(error.message, showStart);
  }
}

function showProblem(message, again) {
  $('problem').replaceChildren(h('div', { className: 'trouble' }, h('p', {}, message),
    again ? h('button', { type: 'button', className: 'quiet', onclick: () => { clearProblem(); again(); } }, 'Try again') : null));
}

function clearProblem() { $('problem').replaceChildren(); $('where').removeAttribute('aria-invalid'); }

// -- references -----------------------------------------------------------------------------------------------------

function addFiles(files) {
  const limits = state.server.limits, problems = [];
  for (const file of files) {
    if (!file.type.startsWith('image/')) problems.push(`${file.name} is no picture.`);
    else if (file.size > limits.upload_bytes) problems.push(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; at most ${limits.upload_bytes / 2 ** 20} MiB are taken.`);
    else addReference({ file, name: file.name || 'pasted picture', url: URL.createObjectURL(file), weight: 1 });
  }
  clearProblem();
  if (problems.length) showProblem(problems.join(' '));
  if (problems.length < files.length) sayReferences();
  showReferences();
}

function sayReferences() {
  const several = state.refs.length > 1;
  $('status').textContent = `${state.refs.map((reference) => reference.name).join(', ')} ${several ? 'are the references' : 'is the reference'}. `
    + `Say what should be different, or search for pictures like ${several ? 'them' : 'it'}.`;
}

function addReference(reference) {
  // Where there is no more room, the oldest makes place: what somebody has just chosen is what they mean.
  state.refs = [...state.refs, reference].slice(-state.server.limits.pictures);
}

function useAsReference(name, picture) {
  state.refs = [{ index: name, id: picture.id, name: fileName(picture.path), url: thumbnail(name, picture.id, 160), weight: 1 }];
  showReferences();
  if ($('detail').open) $('detail').close();
  if ($('text').value.trim()) search();
  else {
    sayReferences();
    $('text').focus();
  }
}

function showReferences() {
  const several = state.refs.length > 1;
  $('refs').replaceChildren(...state.refs.map((reference) => h('li', {},
    h('img', { src: reference.url, alt: '' }),
    h('span', { className: 'name', title: reference.name }, reference.name),
    h('button', { type: 'button', className: 'icon', 'aria-label': `Remove ${reference.name}`, onclick: () => {
      state.refs = state.refs.filter((other) => other !== reference);
      showReferences();
      $('file').focus();
    } }, '×'),
    several ? h('label', {}, 'weight', h('input', { type: 'range', min: '0.1', max: '2', step: '0.1', value: String(reference.weight), 'aria-label': `Weight of ${reference.name}`,
      oninput: (event) => { reference.weight = Number(event.target.value); } })) : null)));
}

$('file').addEventListener('change', () => { addFiles($('file').files); $('file').value = ''; });
document.addEventListener('paste', (event) => {
  const files = [...event.clipboardData.files];
  if (files.length && state.server) { event.preventDefault(); addFiles(files); }
});
let depth = 0;
const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes('Files');
document.addEventListener('dragenter', (event) => { if (carriesFiles(event)) { depth += 1; $('overlay').hidden = false; } });
document.addEventListener('dragleave', (event) => { if (carriesFiles(event) && --depth <= 0) { depth = 0; $('overlay').hidden = true; } });
document.addEventListener('dragover', (event) => { if (carriesFiles(event)) event.preventDefault(); });
document.addEventListener('drop', (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  depth = 0;
  $('overlay').hidden = true;
  if (state.server) addFiles(event.dataTransfer.files);
});

// -- filter ---------------------------------------------------------------------------------------------------------

const OPERATORS = { number: ['<', '<=', '=', '!=', '>=', '>'], text: ['=', '!=', 'like', 'is null', 'is not null'] };

function fillColumns() {
  const own = column($('index').value);
  $('column').replaceChildren(...(own ? own.columns : []).map((item) => h('option', { value: item.name, 'data-kind': item.kind }, item.name)));
  fillOperators();
}

const columnKind = () => ($('column').selectedOptions[0] ? $('column').selectedOptions[0].dataset.kind : 'text');

function fillOperators() {
  $('operator').replaceChildren(...OPERATORS[columnKind()].map((sign) => h('option', {}, sign)));
  $('value').inputMode = columnKind() === 'number' ? 'decimal' : 'text';
  showMarks();
}

// "or" binds less than "and"; a text that holds the word gets parentheses too, which change nothing.
const both = (before, condition) => `${/\bor\b/i.test(before) ? `(${before})` : before} and ${condition}`;

function addCondition() {
  const kind = columnKind(), name = $('column').value, sign = $('operator').value, value = $('value').value.trim();
  const needsNone = sign.startsWith('is ');
  if (!needsNone && (!value || (kind === 'number' && Number.isNaN(Number(value))))) {
    $('value').setAttribute('aria-invalid', 'true');
    $('value').focus();
    return;
  }
  $('value').removeAttribute('aria-invalid');
  const written = /^[A-Za-z_]\w*$/.test(name) && !/^(and|or|not|in|like|is|null|between|true|false)$/i.test(name) ? name : `"${name.replaceAll('"', '""')}"`;
  const quoted = kind === 'number' ? value : `'${value.replaceAll("'", "''")}'`;
  const condition = needsNone ? `${written} ${sign}` : `${written} ${sign} ${quoted}`;
  const before = $('where').value.trim();
  $('where').value = before ? both(before, condition) : condition;
  $('value').value = '';
  showMarks();
}

$('column').addEventListener('change', fillOperators);
$('add').addEventListener('click', addCondition);
$('value').addEventListener('keydown', (event) => { if (event.key === 'Enter' && !event.isComposing) { event.preventDefault(); addCondition(); } });

// -- options --------------------------------------------------------------------------------------------------------

const DEFAULTS = { 'image-weight': '0.5', without: '', 'without-weight': '0.5', k: '24', 'min-score': '', fold: true, keep: false, exact: false };

const valueOf = (id) => ($(id).type === 'checkbox' ? $(id).checked : $(id).value);
function setValue(id, value) { if ($(id).type === 'checkbox') $(id).checked = value; else $(id).value = value; }

function showMarks() {
  const weight = Number($('image-weight').value);
  $('image-weight-shown').textContent = weight === 0.5 ? "model's own" : weight === 0 ? 'text alone' : weight === 1 ? 'picture alone' : weight.toFixed(2);
  $('options-on').hidden = !Object.entries(DEFAULTS).some(([id, value]) => valueOf(id) !== value);
  $('filter-on').hidden = !$('where').value.trim();
}

$('reset').addEventListener('click', () => { Object.entries(DEFAULTS).forEach(([id, value]) => setValue(id, value)); showMarks(); });
$('ask').addEventListener('input', showMarks);
// While a word is composed, as in Japanese or Chinese, Enter only takes it.
$('text').addEventListener('keydown', (event) => { if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); search(); } });
$('ask').addEventListener('submit', (event) => { event.preventDefault(); search(); });
$('index').addEventListener('change', () => { fillColumns(); again(); });
$('second').addEventListener('change', again);

function again() {
  if (state.asked || state.refs.length || $('text').value.trim()) search();
  else showStart();
}

// -- asking ---------------------------------------------------------------------------------------------------------

function question() {
  const options = Object.fromEntries(Object.keys(DEFAULTS).map((id) => [id, valueOf(id)]));
  return { refs: [...state.refs], text: $('text').value.trim(), where: $('where').value.trim(), options };
}

/** Write a question as the server takes it. A reference of another index is sent as the file that it is. */
async function formFor(name, asked, signal) {
  const form = new FormData();
  const files = [], ids = [];
  for (const reference of asked.refs) {
    if (reference.file) files.push([reference, reference.file]);
    else if (reference.index === name) ids.push([reference, reference.id]);
    else files.push([reference, await (await ask(original(reference.index, reference.id), { signal })).blob()]);
  }
  files.forEach(([, file]) => form.append('picture', file));
  ids.forEach(([, id]) => form.append('picture_id', id));
  if (asked.refs.length > 1) [...files, ...ids].forEach(([reference]) => form.append('weight', reference.weight));
  const { options } = asked;
  const fields = { text: asked.text, where: asked.where, k: options.k, image_weight: options['image-weight'], without: options.without,
    without_weight: options['without-weight'], min_score: options['min-score'], fold: options.fold, keep_references: options.keep, exact: options.exact };
  Object.entries(fields).forEach(([field, value]) => { if (value !== '') form.append(field, value); });
  return form;
}

/** End the search that runs, if any: its answer is not shown. */
function endSearch() {
  if (state.running) state.running.abort();
  state.running = null;
  $('results').removeAttribute('aria-busy');
}

/** Ask and show the answers; with `keep` the answers before stay until then. */
async function search({ remember = true, keep = false } = {}) {
  if (!state.server) return;
  const asked = question();
  clearProblem();
  if (!asked.refs.length && !asked.text) {
    showProblem('There is nothing to look for yet: choose a picture, or say what to look for.');
    $('text').focus();
    return;
  }
  endSearch();
  const running = state.running = new AbortController();
  const names = [...new Set([$('index').value, $('second').value].filter(Boolean))];
  const hadFocus = document.activeElement !== document.body;
  showWaiting(names, keep);
  const outcomes = await Promise.allSettled(names.map(async (name) => {
    const body = await formFor(name, asked, running.signal);
    return (await ask(`${indexPath(name)}/search`, { method: 'POST', body, signal: running.signal })).json();
  }));
  if (running.signal.aborted) return;
  endSearch();
  const failed = outcomes.findIndex((outcome) => outcome.status === 'rejected');
  if (failed >= 0) {
    const { message, status } = outcomes[failed].reason;
    if (/^The condition/.test(message)) { $('where').setAttribute('aria-invalid', 'true'); $('filter').open = true; }
    $('columns').replaceChildren();
    $('status').textContent = '';
    $('exports').hidden = true;
    if (status !== 401) showProblem(`${names.length > 1 && status ? `${names[failed]}: ` : ''}${message}`, status === 0 || status >= 500 ? search : null);
  } else {
    state.asked = asked;
    state.answers = Object.fromEntries(outcomes.map((outcome) => [outcome.value.index, outcome.value]));
    showAnswers(names);
    if (remember) { addToPast(asked); toAddress(asked); }
  }
  // What had the focus may be gone; the keyboard then goes on at the results, not at the top of the page.
  if (hadFocus && document.activeElement === document.body) $('results').focus({ preventScroll: true });
}

function showWaiting(names, keep) {
  $('h-results').textContent = 'Results';
  $('up').hidden = false;
  $('results').setAttribute('aria-busy', 'true');
  $('exports').hidden = true;
  $('status').textContent = 'Searching …';
  if (keep) return;
  $('columns').className = names.length > 1 ? 'two' : '';
  $('columns').replaceChildren(...names.map(() => h('div', { className: 'grid', 'aria-hidden': 'true' },
    Array.from({ length: names.length > 1 ? 6 : 10 }, () => h('div', { className: 'skeleton' })))));
  if (matchMedia('(max-width: 860px)').matches) $('results').scrollIntoView({ block: 'start' });
}

// -- answers --------------------------------------------------------------------------------------------------------

function showAnswers(names) {
  const shared = names.length > 1 ? common(names) : null;
  $('columns').className = names.length > 1 ? 'two' : '';
  $('columns').replaceChildren(...names.map((name) => answerColumn(name, shared)));
  $('exports').hidden = !names.some((name) => state.answers[name].hits.length);
  const total = names.map((name) => state.answers[name].hits.length);
  $('status').textContent = names.length > 1
    ? `${names.map((name, place) => `${name}: ${many(total[place], 'result')}`).join(', ')}; ${many(shared.size, 'picture')} in both.`
    : `${many(total[0], 'result')}. ${facts(state.answers[names[0]])}`;
}

/** Return the contents that all answers have. */
function common(names) {
  const [first, ...rest] = names.map((name) => new Set(state.answers[name].hits.map((hit) => hit.sha256)));
  return new Set([...first].filter((content) => rest.every((other) => other.has(content))));
}

function facts(answer) {
  const parts = [`${many(answer.searched, 'different picture')} searched in ${Math.max(1, Math.round(answer.milliseconds))} ms`];
  if (answer.folded) parts.push(`${many(answer.folded, 'near-duplicate')} folded`);
  if (answer.left_out.length) parts.push('the reference itself is left out');
  if (!answer.exact) parts.push(`found by candidates (${percent(answer.recall)} % of the best)`);
  return `${parts.join('; ')}.`;
}

function answerColumn(name, shared) {
  const answer = state.answers[name];
  const list = h('ol', { className: 'grid', 'aria-label': `Results of ${name}`, onkeydown: moveInGrid },
    answer.hits.map((hit, place) => card(name, hit, place, shared)));
  const more = answer.hits.length && answer.hits.length === Number($('k').value) && answer.hits.length < state.server.limits.results
    ? h('button', { type: 'button', className: 'more', onclick: () => showMore(name) }, 'Show more') : null;
  return h('section', { className: 'column', 'aria-label': name, 'data-index': name },
    shared ? [h('h2', {}, name), h('p', { className: 'facts' }, facts(answer))] : null,
    answer.hits.length ? [list, more] : nothingFound(answer));
}

function nothingFound(answer) {
  const reasons = [];
  if (answer.searched === 0) reasons.push('No picture meets the condition.');
  else if ($('min-score').value) reasons.push(`No picture scores ${$('min-score').value} or more.`);
  else reasons.push('No other picture meets the question.');
  return h('div', { className: 'empty' }, h('h2', {}, 'Nothing found'), h('p', {}, reasons.join(' ')),
    $('where').value.trim() ? h('button', { type: 'button', onclick: () => { $('where').value = ''; showMarks(); search(); } }, 'Search without the condition') : null,
    $('min-score').value ? h('button', { type: 'button', onclick: () => { $('min-score').value = ''; showMarks(); search(); } }, 'Search without a least score') : null);
}

async function showMore(name) {
  const shown = state.answers[name].hits.length;
  const wanted = Math.min(2 * Number($('k').value), state.server.limits.results);
  if (![...$('k').options].some((option) => Number(option.value) === wanted)) $('k').append(h('option', {}, String(wanted)));
  $('k').value = String(wanted);
  showMarks();
  await search({ remember: false, keep: true });
  const first = document.querySelectorAll(`[data-index="${CSS.escape(name)}"] .open`)[shown];
  if (first) first.focus();
}

const BROKEN = 'The picture cannot be shown; its file may be gone or changed.';

function card(name, hit, place, shared) {
  const own = Object.entries(hit.columns).filter(([, value]) => value !== null).map(([key, value]) => `${key} ${value}`).join(' · ');
  const label = `${place + 1}: ${fileName(hit.path)}, score ${hit.score.toFixed(3)}`;
  const open = h('button', { type: 'button', className: 'open', 'data-why': BROKEN, 'data-id': String(hit.id),
    'aria-label': `${label}; show details`, onclick: () => showDetail(name, hit) },
  h('img', { src: thumbnail(name, hit.id), alt: '', loading: 'lazy', onerror: () => { open.classList.add('broken'); open.setAttribute('aria-label', `${label}; ${BROKEN} Show details`); } }),
  h('span', { className: 'place', 'aria-hidden': 'true' }, String(place + 1)));
  return h('li', { className: 'card' }, open, h('div', { className: 'body' },
    h('p', { className: 'score' }, hit.score.toFixed(3), h('small', { title: 'share of the index that scores less' }, `above\u00a0${percent(hit.share_below)}\u00a0%`)),
    h('p', { className: 'path', title: hit.path }, fileName(hit.path)),
    own ? h('p', { className: 'own' }, own) : null,
    hit.duplicates.length ? h('p', { className: 'own' }, `+ ${many(hit.duplicates.length, 'picture')} like it`) : null,
    shared && !shared.has(hit.sha256) ? h('p', { className: 'only' }, 'only here') : null,
    h('button', { type: 'button', className: 'quiet', onclick: () => useAsReference(name, hit), 'aria-label': `Use as reference: ${fileName(hit.path)}` }, 'Use as reference')));
}

/** Let the arrow keys move between cards, and r make the card's picture the reference. */
function moveInGrid(event) {
  const cards = [...event.currentTarget.children];
  const place = cards.findIndex((item) => item.contains(event.target));
  if (place < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const perRow = cards.filter((item) => item.offsetTop === cards[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perRow, ArrowUp: -perRow }[event.key];
  if (step && cards[place + step]) {
    event.preventDefault();
    cards[place + step].querySelector('.open').focus();
  } else if (event.key === 'r') cards[place].querySelector('.quiet').click();
}

// Links inside the page would change the address, which holds the question.
$('skip').addEventListener('click', (event) => { event.preventDefault(); $('results').focus(); });
$('up').addEventListener('click', () => { $('ask').scrollIntoView({ block: 'start' }); $('text').focus({ preventScroll: true }); });

document.addEventListener('keydown', (event) => {
  if (event.key === '/' && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && !document.querySelector('dialog[open]')) {
    event.preventDefault();
    $('text').focus();
  }
});

function showDetail(name, hit) {
  const dialog = $('detail');
  const copy = h('button', { type: 'button', onclick: async () => {
    try { await navigator.clipboard.writeText(hit.path); copy.textContent = 'Copied'; } catch { copy.textContent = 'Select the path below'; }
  } }, 'Copy the path');
  const pairs = [['score', `${hit.score.toFixed(4)} (cosine)`], ['above', `${percent(hit.share_below)} % of the index`], ['path', hit.path],
    ['size', `${hit.width} × ${hit.height}, ${Math.ceil(hit.bytes / 1024)} KiB`], ['changed', `${new Date(1000 * hit.modified).toISOString().slice(0, 16).replace('T', ' ')} UTC`],
    ['id', String(hit.id)], ...Object.entries(hit.columns)]; // own columns may have the names of these
  dialog.replaceChildren(h('div', { className: 'detail' },
    h('img', { src: thumbnail(name, hit.id, 1600), alt: fileName(hit.path), onerror: (event) => event.target.replaceWith(h('p', { className: 'gone' }, BROKEN)) }),
    h('div', {}, h('h2', { id: 'detail-title' }, fileName(hit.path)),
      h('div', { className: 'actions' },
        h('button', { type: 'button', className: 'primary', onclick: () => useAsReference(name, hit) }, 'Use as reference'),
        copy,
        h('a', { className: 'button', href: original(name, hit.id), target: '_blank', rel: 'noopener' }, 'Open the file'),
        h('button', { type: 'button', onclick: () => dialog.close() }, 'Close')),
      h('dl', { className: 'facts' }, pairs.filter(([, value]) => value !== null).flatMap(([key, value]) => [h('dt', {}, key), h('dd', {}, String(value))])),
      hit.duplicates.length ? h('div', { className: 'alike' }, `${many(hit.duplicates.length, 'picture')} like it:`,
        h('ul', {}, hit.duplicates.map((other) => h('li', {}, h('a', { href: original(name, other.id), target: '_blank', rel: 'noopener' }, other.path))))) : null)));
  dialog.showModal();
}
$('detail').addEventListener('click', (event) => { if (event.target === $('detail')) $('detail').close(); });

// -- export ---------------------------------------------------------------------------------------------------------

function save(name, kind, text) {
  const url = URL.createObjectURL(new Blob([text], { type: kind }));
  h('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Write a cell; a spreadsheet would compute a text that begins like a formula, so a quote goes before it. */
function cell(value) {
  let text = value === null || value === undefined ? '' : String(value);
  if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function asCsv(answers) {
  const own = [...new Set(answers.flatMap((answer) => answer.hits.flatMap((hit) => Object.keys(hit.columns))))];
  const fixed = ['score', 'share_below', 'id', 'path', 'sha256', 'width', 'height', 'bytes'];
  const rows = answers.flatMap((answer) => answer.hits.map((hit, place) => [answer.index, place + 1, ...fixed.map((key) => hit[key]),
    hit.duplicates.map((other) => other.path).join('\n'), ...own.map((key) => hit.columns[key])]));
  return [['index', 'place', ...fixed, 'duplicates', ...own], ...rows].map((row) => row.map(cell).join(',')).join('\r\n') + '\r\n';
}

$('exports').addEventListener('click', (event) => {
  const kind = event.target.dataset.export;
  const answers = Object.values(state.answers);
  const { refs, text, where, options } = state.asked || question();
  const references = refs.map((reference) => (reference.file ? { file: reference.name } : { index: reference.index, id: reference.id }));
  if (kind === 'json') save('results.json', 'application/json', JSON.stringify({ question: { references, text, where, ...options }, answers }, null, 1));
  if (kind === 'csv') save('results.csv', 'text/csv', asCsv(answers));
  if (kind === 'paths') save('results.txt', 'text/plain', answers.flatMap((answer) => answer.hits.map((hit) => `${hit.path}\n`)).join(''));
});

// -- history and address --------------------------------------------------------------------------------------------

const isKept = (asked) => asked.refs.every((reference) => !reference.file);

function addToPast(asked) {
  const key = (other) => JSON.stringify([other.refs.map((r) => [r.index, r.id, r.name]), other.text, other.where, other.options]);
  state.past = [{ ...asked, time: Date.now() }, ...state.past.filter((other) => key(other) !== key(asked))].slice(0, MOST_PAST);
  try { sessionStorage.setItem('past', JSON.stringify(state.past.filter(isKept))); } catch { /* the tab alone has it then */ }
  showPast();
}

function restorePast() {
  try {
    const known = new Set(state.server.indexes.map((index) => index.name));
    const kept = JSON.parse(sessionStorage.getItem('past') || '[]');
    if (!state.past.length) state.past = kept.filter((asked) => asked.refs.every((reference) => known.has(reference.index)));
  } catch { state.past = []; }
  showPast();
}

function showPast() {
  $('no-history').hidden = state.past.length > 0;
  $('past-count').hidden = !state.past.length;
  $('past-count').textContent = String(state.past.length);
  $('history').replaceChildren(...state.past.map((asked) => h('li', {}, h('button', { type: 'button', onclick: () => restore(asked) },
    asked.refs[0] ? h('img', { src: asked.refs[0].url, alt: '' }) : null,
    h('span', { className: 'said' }, asked.text || 'pictures like this',
      h('small', {}, [new Date(asked.time).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' }), asked.where].filter(Boolean).join(' · ')))))));
}

function restore(asked, remember = true) {
  state.refs = asked.refs.map((reference) => ({ ...reference }));
  $('text').value = asked.text;
  $('where').value = asked.where;
  if (![...$('k').options].some((option) => option.value === asked.options.k)) $('k').append(h('option', {}, asked.options.k));
  Object.entries({ ...DEFAULTS, ...asked.options }).forEach(([id, value]) => setValue(id, value));
  showReferences();
  showMarks();
  search({ remember });
}

/** Put a question into the address, so that it can be kept and the way back works. An uploaded picture cannot be: the
 * address then holds nothing, rather than another question. */
function toAddress(asked) {
  if (!isKept(asked)) {
    if (location.hash) history.pushState(null, '', location.pathname);
    return;
  }
  const changed = Object.entries(asked.options).filter(([id, value]) => value !== DEFAULTS[id]);
  const parts = { index: $('index').value, with: $('second').value, text: asked.text, where: asked.where,
    ref: asked.refs.length ? JSON.stringify(asked.refs.map((r) => [r.index, r.id, r.name, r.weight])) : '', options: changed.length ? JSON.stringify(Object.fromEntries(changed)) : '' };
  const hash = `#${new URLSearchParams(Object.entries(parts).filter(([, value]) => value))}`;
  if (hash !== location.hash) history.pushState(null, '', hash);
}

function fromAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.get('text') && !parts.get('ref')) return false;
  try {
    const names = new Set(state.server.indexes.map((index) => index.name));
    if (names.has(parts.get('index'))) $('index').value = parts.get('index');
    $('second').value = names.has(parts.get('with')) ? parts.get('with') : '';
    fillColumns();
    const refs = JSON.parse(parts.get('ref') || '[]').filter(([name, id]) => names.has(name) && Number.isSafeInteger(id))
      .map(([name, id, label, weight]) => ({ index: name, id, name: String(label), url: thumbnail(name, id, 160), weight: Number(weight) || 1 }));
    const given = JSON.parse(parts.get('options') || '{}');
    const options = Object.fromEntries(Object.entries(DEFAULTS).map(([id, value]) => [id, typeof given[id] === typeof value ? given[id] : value]));
    restore({ refs, text: parts.get('text') || '', where: parts.get('where') || '', options }, false);
    return true;
  } catch { return false; }
}

addEventListener('popstate', () => { if (state.server && !fromAddress()) { state.asked = null; state.refs = []; $('text').value = ''; showReferences(); clearProblem(); showStart(); } });

begin();
