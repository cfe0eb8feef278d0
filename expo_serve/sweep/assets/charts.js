// Figures: the mark next to the pointer, or the one that the arrow keys have come to, says its numbers.

class Figure {
  constructor(figure) {
    this.figure = figure;
    this.svg = figure.querySelector("svg");
    this.tip = figure.querySelector(".tip");
    this.points = [...figure.querySelectorAll(".point")];
    this.at = -1;
    if (!this.points.length) return;
    this.svg.addEventListener("pointermove", (event) => this.show(this.nearest(event)));
    this.svg.addEventListener("pointerdown", (event) => this.show(this.nearest(event)));
    figure.addEventListener("pointerleave", () => this.hide());
    figure.addEventListener("blur", () => this.hide());
    figure.addEventListener("keydown", (event) => this.onKey(event));
  }

  nearest(event) {
    let best = 0;
    let least = Infinity;
    this.points.forEach((point, index) => {
      const box = point.getBoundingClientRect();
      const x = box.x + box.width / 2 - event.clientX;
      const y = box.y + box.height / 2 - event.clientY;
      const distance = x * x + 0.1 * y * y;
      if (distance < least) [best, least] = [index, distance];
    });
    return best;
  }

  onKey(event) {
    const last = this.points.length - 1;
    const next = { ArrowRight: this.at + 1, ArrowLeft: this.at < 0 ? last : this.at - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.hide();
    if (next === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.show(Math.min(last, Math.max(0, next)));
  }

  show(index) {
    this.at = index;
    const point = this.points[index];
    this.tip.setAttribute("role", "status");
    this.tip.hidden = false;
    this.tip.textContent = point.dataset.tip;
    this.ring(point);
    const whole = this.figure.getBoundingClientRect();
    const mark = point.getBoundingClientRect();
    const x = mark.x + mark.width / 2 - whole.x - this.tip.offsetWidth / 2;
    const above = mark.y - whole.y - this.tip.offsetHeight - 12;
    this.tip.style.left = `${Math.max(6, Math.min(x, whole.width - this.tip.offsetWidth - 6))}px`;
    this.tip.style.top = `${above > 0 ? above : mark.bottom - whole.y + 12}px`;
  }

  ring(point) {
    this.circle ??= this.svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "circle"));
    this.circle.setAttribute("class", "ring");
    const box = point.getBBox();
    this.circle.setAttribute("cx", box.x + box.width / 2);
    this.circle.setAttribute("cy", box.y + box.height / 2);
    this.circle.setAttribute("r", 8);
  }

  hide() {
    this.at = -1;
    this.tip.hidden = true;
    this.circle?.remove();
    this.circle = undefined;
  }
}

function startCharts() {
  for (const figure of document.querySelectorAll(".chart")) new Figure(figure);
}
