/* Charts as SVG, whose colours follow the page's. */
function chart(width, height, label) {
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

/* As wide as its place, so that its text has the page's size on a phone and on a wall. */
const wide = (place) => Math.max(280, place.clientWidth || 720);

function histogram(values, threshold) {
  const place = at("histogram"), { edges, parts, normal } = values;
  if (!edges.length) return place.replaceChildren(make("p", { class: "soft" }, "No part has a score yet."));
  const [width, height, floor] = [wide(place), 240, 208];
  const svg = chart(width, height, `Image scores of ${parts.reduce((a, b) => a + b, 0)} parts beside those of the normal images`);
  const [low, high] = [Math.log(edges[0]), Math.log(edges[edges.length - 1])];
  const x = (score) => width * (Math.log(Math.max(score, edges[0])) - low) / (high - low);
  const totals = [parts, normal].map((counts) => Math.max(1, counts.reduce((a, b) => a + b, 0)));
  const most = Math.max(...parts.map((n) => n / totals[0]), ...normal.map((n) => n / totals[1]));
  const y = (share) => floor - (floor - 26) * share / most;
  svg.append(draw("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }));
  parts.forEach((count, n) => {
    if (count) svg.append(draw("rect", { class: "own", x: x(edges[n]) + .5, width: Math.max(1, x(edges[n + 1]) - x(edges[n]) - 1), y: y(count / totals[0]), height: floor - y(count / totals[0]) }));
  });
  const line = normal.flatMap((count, n) => [`${x(edges[n])},${y(count / totals[1])}`, `${x(edges[n + 1])},${y(count / totals[1])}`]);
  svg.append(draw("polyline", { class: "normals", points: line.join(" ") }));
  for (let n = 0; n < edges.length; n += width < 480 ? 20 : 10) svg.append(draw("text", { x: x(edges[n]), y: height - 8, "text-anchor": n ? n > 35 ? "end" : "middle" : "start" }, figure(edges[n])));
  if (threshold) {
    svg.append(draw("line", { class: "mark", x1: x(threshold), x2: x(threshold), y1: 18, y2: floor }));
    svg.append(draw("text", { x: Math.min(width - 4, Math.max(4, x(threshold))), y: 12, "text-anchor": x(threshold) > width / 2 ? "end" : "start" }, `threshold ${figure(threshold)}`));
  }
  place.replaceChildren(svg, make("figcaption", { class: "soft" }, "Filled: the newest parts. Line: the normal images, each compared with the others. Score from left to right, on a logarithmic scale."));
}

function trend(points) {
  const place = at("trend"), known = points.filter((point) => point.score !== null);
  if (!known.length) return place.replaceChildren(make("p", { class: "soft" }, "No part has a score yet."));
  const [width, height, floor] = [wide(place), 190, 164];
  const svg = chart(width, height, `Scores of the newest ${known.length} parts in their order`);
  const y = (score) => floor - (floor - 10) * Math.min(1, score);
  svg.append(draw("line", { class: "mark", x1: 0, x2: width, y1: y(.5), y2: y(.5) }));
  svg.append(draw("text", { x: 4, y: y(.5) - 6 }, "threshold"));
  svg.append(draw("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }));
  known.forEach((point, n) => {
    const dot = draw("circle", { class: `dot ${point.verdict || "none"}`, r: 3.5, cx: known.length > 1 ? 6 + (width - 12) * n / (known.length - 1) : width / 2, cy: y(point.score) });
    dot.append(draw("title", {}, `${clock(point.at)}: ${figure(point.score)}`));
    svg.append(dot);
  });
  svg.append(draw("text", { x: 4, y: height - 4 }, clock(known[0].at)), draw("text", { x: width - 4, y: height - 4, "text-anchor": "end" }, clock(known[known.length - 1].at)));
  place.replaceChildren(svg, make("figcaption", { class: "soft" }, "Each dot is a part, oldest on the left; higher is more anomalous."));
}
