// Which words of two texts are not in a longest common subsequence of both.

const MOST_CELLS = 4e6;
const segmenter = typeof Intl.Segmenter === "function" ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;

// A word and the space behind it, or a mark; also where no space separates words.
function wordsOf(text) {
  if (!segmenter) return text.match(/\s*\S+\s*/g) || (text ? [text] : []);
  const words = [];
  for (const { segment } of segmenter.segment(text)) {
    if (words.length && !segment.trim()) words[words.length - 1] += segment;
    else words.push(segment);
  }
  return words;
}

function linesOf(text) {
  return text.match(/[^\n.!?]*[\n.!?]+\s*|[^\n.!?]+$/g) || [];
}

// Give for each text its parts as runs {text, same}.
function compareTexts(left, right) {
  for (const cut of [wordsOf, linesOf]) {
    const [a, b] = [cut(left), cut(right)];
    const same = commonParts(a.map((part) => part.trim()), b.map((part) => part.trim()));
    if (same) return [runsOf(a, same[0]), runsOf(b, same[1])];
  }
  return [[{ text: left, same: false }], [{ text: right, same: false }]];
}

// Give for each list which entries are common, in order; null if that takes too long to find out.
function commonParts(a, b) {
  const same = [new Array(a.length).fill(false), new Array(b.length).fill(false)];
  const mark = (i, j) => { same[0][i] = true; same[1][j] = true; };
  let begin = 0;
  let [m, n] = [a.length, b.length];
  while (begin < m && begin < n && a[begin] === b[begin]) mark(begin, begin++);
  while (m > begin && n > begin && a[m - 1] === b[n - 1]) mark(--m, --n);
  const width = n - begin + 1;
  if ((m - begin + 1) * width > MOST_CELLS) return null;
  // lengths[i, j]: length of the longest common subsequence of a[i..m) and b[j..n).
  const lengths = new Uint16Array((m - begin + 1) * width);
  for (let i = m - 1; i >= begin; i--) {
    for (let j = n - 1; j >= begin; j--) {
      const here = (i - begin) * width + j - begin;
      lengths[here] = a[i] === b[j]
        ? lengths[here + width + 1] + 1
        : Math.max(lengths[here + width], lengths[here + 1]);
    }
  }
  for (let i = begin, j = begin; i < m && j < n;) {
    const here = (i - begin) * width + j - begin;
    if (a[i] === b[j]) mark(i++, j++);
    else if (lengths[here + width] >= lengths[here + 1]) i++;
    else j++;
  }
  return same;
}

function runsOf(parts, same) {
  const runs = [];
  parts.forEach((text, index) => {
    const last = runs[runs.length - 1];
    if (last && last.same === same[index]) last.text += text;
    else runs.push({ text, same: same[index] });
  });
  return runs;
}
