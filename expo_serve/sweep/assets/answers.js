// Answers of two alphas side by side. Those of an alpha are parsed when they are first shown, and a page holds a few.

const PER_PAGE = 5;
const LONG_LETTERS = 1800;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function numberText(value, unit) {
  if (unit === "share") return `${Number((100 * value).toPrecision(4))}%`;
  return String(Number(value.toPrecision(4)));
}

class Answers {
  constructor(data) {
    this.data = data;
    this.parsed = new Map();
    this.form = document.getElementById("controls");
    this.pager = document.getElementById("pager");
    this.page = 0;
    this.offerChoices();
    this.form.hidden = false;
    this.form.addEventListener("submit", (event) => event.preventDefault());
    for (const name of ["left", "right", "order"]) this.form[name].addEventListener("change", () => this.choose());
    let waiting;
    this.form.query.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.choose(), 150);
    });
    for (const button of this.pager.querySelectorAll("button")) {
      button.addEventListener("click", () => this.turn(this.page + Number(button.dataset.step)));
    }
    this.pageField = this.pager.querySelector("input");
    this.pageField.addEventListener("change", () => this.turn(this.pageField.valueAsNumber - 1));
    this.choose();
  }

  offerChoices() {
    const { alphas, notes, measures, left, right } = this.data;
    for (const [name, chosen] of [["left", left], ["right", right]]) {
      alphas.forEach((alpha, index) => {
        const option = new Option(`alpha ${alpha}${notes[index] ? ` (${notes[index]})` : ""}`, index);
        this.form[name].append(option);
      });
      this.form[name].value = chosen;
    }
    this.form.order.append(new Option("as asked", ""));
    measures.forEach(({ label }, index) => {
      this.form.order.append(new Option(`${label}: rises most`, `${index} 1`), new Option(`${label}: falls most`, `${index} -1`));
    });
  }

  of(alpha) {
    if (!this.parsed.has(alpha)) {
      this.parsed.set(alpha, JSON.parse(document.getElementById(`answers-${alpha}`).textContent));
    }
    return this.parsed.get(alpha);
  }

  score(measure, alpha, prompt) {
    return measure.scores[alpha][prompt] ?? undefined;
  }

  difference(measure, prompt) {
    return this.score(measure, this.right, prompt) - this.score(measure, this.left, prompt);
  }

  choose() {
    this.left = Number(this.form.left.value);
    this.right = Number(this.form.right.value);
    const query = this.form.query.value.toLowerCase();
    const texts = [this.data.prompts, this.of(this.left).texts, this.of(this.right).texts];
    this.found = [...this.data.prompts.keys()].filter((prompt) => (
      texts.some((list) => (list[prompt] ?? "").toLowerCase().includes(query))
    ));
    if (this.form.order.value) {
      const [index, sign] = this.form.order.value.split(" ").map(Number);
      const by = new Map(this.found.map((prompt) => [prompt, sign * this.difference(this.data.measures[index], prompt)]));
      const key = (prompt) => (Number.isNaN(by.get(prompt)) ? -Infinity : by.get(prompt));
      this.found.sort((a, b) => (key(a) === key(b) ? a - b : key(b) - key(a)));
    }
    this.show(0);
  }

  turn(page) {
    this.show(page || 0);
    document.getElementById("answers").scrollIntoView({ block: "start" });
  }

  show(page) {
    const pages = Math.max(1, Math.ceil(this.found.length / PER_PAGE));
    this.page = Math.max(0, Math.min(pages - 1, page));
    const shown = this.found.slice(this.page * PER_PAGE, (this.page + 1) * PER_PAGE);
    document.getElementById("pairs").replaceChildren(...shown.map((prompt) => this.pair(prompt)));
    const first = this.page * PER_PAGE + 1;
    document.getElementById("found").textContent = shown.length
      ? `Prompts ${first} to ${first + shown.length - 1} of ${this.found.length}`
      : "No prompt or answer has this text.";
    document.querySelector(".legend").hidden = !shown.length;
    this.pager.hidden = pages < 2;
    this.pageField.value = this.page + 1;
    this.pageField.max = pages;
    document.getElementById("pages").textContent = `of ${pages}`;
    const [back, on] = this.pager.querySelectorAll("button");
    // aria-disabled: a disabled button would lose the focus.
    back.setAttribute("aria-disabled", this.page === 0);
    on.setAttribute("aria-disabled", this.page === pages - 1);
  }

  pair(prompt) {
    const texts = [this.left, this.right].map((alpha) => this.of(alpha).texts[prompt]);
    const runs = compareTexts(texts[0] ?? "", texts[1] ?? "");
    const asked = this.data.prompts[prompt];
    const made = element(
      "article",
      { class: "card pair", "data-prompt": prompt, "aria-labelledby": `prompt-${prompt}` },
      element("h3", { id: `prompt-${prompt}` }, `Prompt ${prompt + 1}`),
      element("p", { class: "asked", dir: "auto" }, asked),
      element(
        "div",
        { class: "sides" },
        this.side(this.left, prompt, texts[0], runs[0], "del"),
        this.side(this.right, prompt, texts[1], runs[1], "ins"),
      ),
    );
    const long = [...made.querySelectorAll(".asked, .text")].filter((part) => part.textContent.length > LONG_LETTERS);
    if (long.length) this.clip(made, long);
    const scores = this.scores(prompt);
    if (scores) made.append(scores);
    return made;
  }

  side(alpha, prompt, text, runs, mark) {
    const head = element("h4", {}, `alpha ${this.data.alphas[alpha]}`);
    if (this.of(alpha).cut.includes(prompt)) head.append(element("span", { class: "chip" }, "cut at the limit"));
    const made = element("section", { class: "side" }, head);
    if (!text) {
      const why = text === "" ? "The answer is empty." : "There is no answer: the prompt failed.";
      made.append(element("p", { class: "text empty" }, why));
    } else {
      const parts = runs.flatMap((run) => (run.same ? [run.text] : marked(run.text, mark)));
      made.append(element("p", { class: "text", dir: "auto" }, ...parts));
    }
    return made;
  }

  clip(pair, long) {
    pair.classList.add("clipped");
    for (const part of long) part.classList.add("long");
    const button = element("button", { type: "button", class: "whole", "aria-expanded": "false" }, "Show all of it");
    button.addEventListener("click", () => {
      const isClipped = pair.classList.toggle("clipped");
      button.textContent = isClipped ? "Show all of it" : "Show less";
      button.setAttribute("aria-expanded", !isClipped);
    });
    pair.append(button);
  }

  scores(prompt) {
    const rows = this.data.measures.map((measure) => this.scoreRow(measure, prompt)).filter(Boolean);
    if (!rows.length) return null;
    const heads = ["Score", this.left, this.right, "Difference"].map((head) => (
      element("th", { scope: "col" }, typeof head === "number" ? `alpha ${this.data.alphas[head]}` : head)
    ));
    return element(
      "table",
      { class: "scores" },
      element("caption", { class: "only-read" }, `Scores of the answers to prompt ${prompt + 1}`),
      element("thead", {}, element("tr", {}, ...heads)),
      element("tbody", {}, ...rows),
    );
  }

  scoreRow(measure, prompt) {
    const values = [this.left, this.right].map((alpha) => this.score(measure, alpha, prompt));
    if (values.every((value) => value === undefined)) return null;
    const cells = values.map((value) => element("td", {}, value === undefined ? "-" : numberText(value, measure.unit)));
    const difference = values[1] - values[0];
    const last = element("td", {}, Number.isNaN(difference) ? "" : signed(numberText(difference, measure.unit)));
    if (difference && measure.better) last.className = (difference > 0) === (measure.better === "higher") ? "gain" : "loss";
    return element("tr", { "data-measure": measure.name }, element("th", { scope: "row" }, measure.label), ...cells, last);
  }
}

function signed(text) {
  return text.startsWith("-") || text === "0" || text === "0%" ? text : `+${text}`;
}

// The space behind a marked word is not marked.
function marked(text, mark) {
  const inner = text.trimEnd();
  return inner ? [element(mark, {}, inner), text.slice(inner.length)] : [text];
}

startTheme();
startCopying();
startCharts();
startTable();
new Answers(JSON.parse(document.getElementById("data").textContent));
