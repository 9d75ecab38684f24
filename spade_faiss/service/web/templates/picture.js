/* The picture of a part with its map, and the normal patch that a patch was matched with. */
const AROUND = 4;
const view = { part: null, image: null, layer: null, matches: null, scale: 1, x: 0, y: 0, cell: null, outlines: true };
const normals = new Map();

function loaded(source) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => resolve(null);
    image.src = source;
  });
}

async function look(part) {
  Object.assign(view, { part, cell: null, matches: null });
  const base = `/v1/inspections/${part.id}`;
  if (part.error) { Object.assign(view, { image: null, layer: null }); paint(); clearPatches(); return; }
  Object.assign(view, { image: null, layer: null });  // never another part's picture under this one's verdict
  fit();
  clearPatches("…");
  const [image, layer] = await Promise.all([loaded(`${base}/picture`), loaded(`${base}/map?kind=layer`)]);
  if (view.part !== part) return;
  Object.assign(view, { image, layer });
  fit();
  const matches = await ask(`${base}/matches`).catch(() => null);
  if (view.part !== part) return;
  view.matches = matches;
  explainWorst();
}

function fit() {
  const canvas = at("canvas");
  const part = view.part;
  if (!part || !part.width) return paint();
  const width = canvas.clientWidth, height = canvas.clientHeight;
  view.scale = Math.min(width / part.width, height / part.height);
  view.x = (width - part.width * view.scale) / 2;
  view.y = (height - part.height * view.scale) / 2;
  paint();
}

function zoom(factor, x = null, y = null) {
  const canvas = at("canvas");
  const [cx, cy] = [x ?? canvas.clientWidth / 2, y ?? canvas.clientHeight / 2];
  const scale = Math.min(60, Math.max(.05, view.scale * factor));
  view.x = cx - (cx - view.x) * scale / view.scale;
  view.y = cy - (cy - view.y) * scale / view.scale;
  view.scale = scale;
  paint();
}

function paint() {
  const canvas = at("canvas"), ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d"), part = view.part;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  if (!part || !part.width) return;
  context.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
  context.imageSmoothingEnabled = view.scale < 4;
  if (view.image) context.drawImage(view.image, 0, 0, part.width, part.height);
  context.globalAlpha = at("opacity").value / 100;
  if (view.layer) context.drawImage(view.layer, 0, 0, part.width, part.height);
  context.globalAlpha = 1;
  if (view.outlines) part.regions.forEach((region) => outline(context, region.polygon));
  if (view.cell) frame(context, cellBox(view.cell.tile, view.cell.row, view.cell.column), 1 / view.scale);
  canvas.setAttribute("aria-label", `${part.name}: ${wordOf(part)}, ${counted(part.regions.length, "region")}`);
}

function outline(context, points) {
  context.beginPath();
  points.forEach(([x, y], number) => number ? context.lineTo(x, y) : context.moveTo(x, y));
  context.closePath();
  for (const [colour, width] of [["rgb(0 0 0 / .75)", 4.5], ["#40e0ff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width / view.scale;
    context.stroke();
  }
}

function frame(context, [left, top, right, bottom], unit) {
  for (const [colour, width] of [["rgb(0 0 0 / .8)", 4], ["#ffffff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * unit;
    context.strokeRect(left, top, right - left, bottom - top);
  }
}

/* Where cells lie: as View.cell_box and View.cell_at of the engine. */
function cellBox(tile, row, column, rows = 1, columns = 1, size = null) {
  const { grid, resized, crop, tiles } = view.matches;
  const [left, top, right, bottom] = size ? [0, 0, size[0], size[1]] : tiles[tile];
  const place = (axis, share, side) => (share * crop[axis] + (resized[axis] - crop[axis] >> 1)) * side / resized[axis];
  return [
    left + place(1, column / grid[1], right - left), top + place(0, row / grid[0], bottom - top),
    left + place(1, (column + columns) / grid[1], right - left), top + place(0, (row + rows) / grid[0], bottom - top),
  ];
}

function cellAt(x, y) {
  const { grid, resized, crop, tiles, sq_distance } = view.matches;
  let best = null;
  tiles.forEach(([left, top, right, bottom], tile) => {
    if (x < left || x >= right || y < top || y >= bottom || !sq_distance.length) return;
    const along = (axis, at, side) => Math.min(grid[axis] - 1, Math.max(0, Math.floor(
      (at * resized[axis] / side - (resized[axis] - crop[axis] >> 1)) * grid[axis] / crop[axis])));
    const row = along(0, y - top, bottom - top), column = along(1, x - left, right - left);
    const distance = sq_distance[tile][row * grid[1] + column];
    if (distance >= 0 && (!best || distance > best.distance)) best = { tile, row, column, distance };
  });
  return best;
}

function explainWorst() {
  const matches = view.matches;
  if (!matches || !matches.sq_distance.length) return clearPatches();
  const region = view.part.regions[0];
  if (region) {
    const [left, top, right, bottom] = region.box;
    return explain(cellAt((left + right) / 2, (top + bottom) / 2));
  }
  let best = { tile: 0, row: 0, column: 0, distance: -1 };
  matches.sq_distance.forEach((values, tile) => values.forEach((distance, cell) => {
    if (distance > best.distance) {
      best = { tile, row: Math.floor(cell / matches.grid[1]), column: cell % matches.grid[1], distance };
    }
  }));
  explain(best);
}

function clearPatches(text = "No patches were searched or kept for this part.") {
  for (const id of ["patch-own", "patch-normal"]) { const canvas = at(id); canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height); }
  at("why-text").textContent = view.part && view.part.error ? view.part.error.message : text;
}

async function explain(cell) {
  if (!cell || !view.matches) return;
  view.cell = cell;
  paint();
  const { grid, keys, neighbour, row, column } = view.matches;
  const number = cell.row * grid[1] + cell.column;
  const key = keys[neighbour[cell.tile][number]];
  const match = { row: row[cell.tile][number], column: column[cell.tile][number] };
  patch(at("patch-own"), view.image, cell.tile, cell.row, cell.column, null);
  at("why-text").textContent = `Matched with ${key}, row ${match.row}, column ${match.column}; distance ${figure(cell.distance)}.`;
  const address = inGallery(`/picture?key=${encodeURIComponent(key)}`);
  if (!normals.has(address)) normals.set(address, loaded(address));
  const normal = await normals.get(address);
  if (view.cell !== cell) return;
  if (normal) patch(at("patch-normal"), normal, 0, match.row, match.column, [normal.naturalWidth, normal.naturalHeight]);
  else {
    normals.delete(address);
    const canvas = at("patch-normal");
    canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    at("why-text").textContent += " Its picture is not at hand: a gallery keeps no pixels; serve with --normal DIR.";
  }
}

function patch(canvas, image, tile, row, column, size) {
  const context = canvas.getContext("2d"), { grid } = view.matches;
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!image) return;
  const rows = Math.min(grid[0], 2 * AROUND + 1), columns = Math.min(grid[1], 2 * AROUND + 1);
  const top = Math.min(Math.max(0, row - AROUND), grid[0] - rows), left = Math.min(Math.max(0, column - AROUND), grid[1] - columns);
  const [x0, y0, x1, y1] = cellBox(tile, top, left, rows, columns, size);
  const scale = Math.min(canvas.width / (x1 - x0), canvas.height / (y1 - y0));
  context.setTransform(scale, 0, 0, scale, (canvas.width - scale * (x1 - x0)) / 2 - scale * x0, (canvas.height - scale * (y1 - y0)) / 2 - scale * y0);
  context.save();
  context.beginPath();
  context.rect(x0, y0, x1 - x0, y1 - y0);
  context.clip();
  context.drawImage(image, 0, 0, size ? size[0] : view.part.width, size ? size[1] : view.part.height);
  context.restore();
  frame(context, cellBox(tile, row, column, 1, 1, size), 1 / scale);
  context.setTransform(1, 0, 0, 1, 0, 0);
}

function bindPicture() {
  const canvas = at("canvas");
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => { drag = [...place(event), view.x, view.y]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = place(event);
    if (drag && event.buttons && Math.hypot(x - drag[0], y - drag[1]) > 3) {
      view.x = drag[2] + x - drag[0];
      view.y = drag[3] + y - drag[1];
      return paint();
    }
    if (!view.matches) return;
    const cell = cellAt((x - view.x) / view.scale, (y - view.y) / view.scale);
    if (cell && (!view.cell || cell.row !== view.cell.row || cell.column !== view.cell.column || cell.tile !== view.cell.tile)) explain(cell);
  });
  canvas.addEventListener("wheel", (event) => { if (event.ctrlKey || document.activeElement === canvas) { event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, ...place(event)); } }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(2, ...place(event)));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!steps || !view.cell || !view.matches) return;
    event.preventDefault();
    event.stopPropagation();
    const { grid, sq_distance } = view.matches, { tile } = view.cell;
    const row = Math.min(grid[0] - 1, Math.max(0, view.cell.row + steps[0])), column = Math.min(grid[1] - 1, Math.max(0, view.cell.column + steps[1]));
    explain({ tile, row, column, distance: sq_distance[tile][row * grid[1] + column] });
  });
  at("opacity").addEventListener("input", paint);
  at("zoom-in").addEventListener("click", () => zoom(1.4));
  at("zoom-out").addEventListener("click", () => zoom(1 / 1.4));
  at("zoom-fit").addEventListener("click", fit);
  at("outlines").addEventListener("click", toggleOutlines);
  new ResizeObserver(fit).observe(canvas);
  at("gradient").style.background = `linear-gradient(90deg, ${start.colours.join(",")})`;
}

function toggleOutlines() {
  view.outlines = !view.outlines;
  at("outlines").setAttribute("aria-pressed", view.outlines);
  paint();
}
