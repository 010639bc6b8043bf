// Shows another pair of runs than the page's first, by the rules of comparison.py.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("comparison").textContent);
  const form = document.getElementById("pair");
  const menus = ["pair-a", "pair-b"].map((name) => document.getElementById(name));
  const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;

  // Half the width of the 95% confidence interval of a mean.
  function interval(values) {
    const n = values.length, center = mean(values);
    const squares = values.reduce((sum, v) => sum + (v - center) ** 2, 0);
    return data.student[n] * Math.sqrt(squares / (n - 1) / n);
  }

  function against(row, a, b) {
    const first = a.values[row].map((pair) => pair[1]), second = new Map(b.values[row]);
    if (!first.length || !second.size || !data.against[row]) return "";
    const others = [...second.values()], digits = data.digits[row];
    if (data.against[row] === "ratio") {
      return mean(first) ? (mean(others) / mean(first)).toFixed(2) + "x" : "";
    }
    const both = a.values[row].filter(([seed]) => second.has(seed))
      .map(([seed, value]) => second.get(seed) - value);
    const shown = both.length ? both : [mean(others) - mean(first)], center = mean(shown);
    return (center < 0 ? "" : "+") + center.toFixed(digits) +
      (shown.length > 1 ? " ± " + interval(shown).toFixed(digits) : "");
  }

  function head(cell, choice, second) {
    const key = document.createElement("span"), style = second ? "dashed" : "solid";
    key.className = "key";
    key.setAttribute("style", `border-top:3px ${style} var(--c${choice.color})`);
    cell.replaceChildren(key, `${second ? "B" : "A"}: ${choice.label}`);
  }

  function fill(table, choices, rows) {
    const heads = [...table.tHead.rows[0].cells];
    choices.forEach((choice, i) => head(heads[i + 1], choice, i > 0));
    table.tBodies[0].replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr");
      row.forEach((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.className = heads[i].className;
        if (!cell.className) cell.removeAttribute("class");
        cell.textContent = text;
        line.append(cell);
      });
      return line;
    }));
  }

  function show() {
    const numbers = menus.map((menu) => Number(menu.value));
    const [a, b] = numbers.map((number) => data.choices[number]);
    fill(document.querySelector("#pair-figures table"), [a, b],
      data.titles.map((title, row) => [title, a.cells[row], b.cells[row], against(row, a, b)])
        .filter((row) => row[1] !== "-" || row[2] !== "-"));
    const names = [...new Set([...Object.keys(a.keys), ...Object.keys(b.keys)])];
    const keys = names.filter((name) => a.keys[name] !== b.keys[name]);
    fill(document.querySelector("#pair-keys table"), [a, b],
      keys.map((name) => [name, a.keys[name] ?? "-", b.keys[name] ?? "-"]));
    document.getElementById("pair-said").textContent = "Keys of the recipes: " +
      `${keys.length} differ, ${data.same + names.length - keys.length} are the same.`;
    for (const line of document.querySelectorAll(".pair [class^=series-]")) {
      const number = Number(line.getAttribute("class").match(/\d+/)[0]);
      line.classList.toggle("first", numbers[0] === number);
      line.classList.toggle("second", numbers[1] === number);
    }
  }

  form.hidden = false;
  form.addEventListener("change", show);
  show();  // a browser that comes back to a page keeps what was picked
})();
