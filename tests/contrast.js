// Every element with text of its own, as [contrast against what is behind it, its text], the faintest first.
// Contrast as in WCAG 2.2, 1.4.3. Colours come as rgb(), rgba() or, from color-mix, as color(srgb r g b).
function parse(colour) {
  const numbers = colour.match(/[\d.]+/g).map(Number);
  return colour.startsWith("color(") ? numbers.map((v, i) => (i < 3 ? v * 255 : v)) : numbers;
}
function luminance(colour) {
  const [r, g, b] = parse(colour).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    const numbers = parse(colour);
    if (numbers.length < 4 || numbers[3] > 0) return colour;
  }
  return "rgb(255, 255, 255)";
}
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const ownText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!ownText || element.tagName.toLowerCase() === "style") continue;
  const style = getComputedStyle(element);
  const text = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [a, b] = [luminance(text), luminance(behind(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.trim().slice(0, 40)]);
}
return found.sort((x, y) => x[0] - y[0]);
