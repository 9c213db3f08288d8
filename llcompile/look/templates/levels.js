// The level mask: says what a block is, and shows the weights of a chosen head. Without it, the titles of blocks say so.
for (const levels of document.querySelectorAll("[data-levels]")) {
  const mask = levels.querySelector(".mask");
  const readout = levels.querySelector(".readout");
  const blocks = [...mask.querySelectorAll("rect")];
  const shades = blocks.map((block) => block.style.getPropertyValue("--shade"));
  let weights = null;
  let current = null;

  const byLevel = (row, level) => row[Math.min(level, row.length - 1)]; // the last one serves all above

  const say = (block) => {
    if (current) current.classList.remove("here");
    current = block;
    block.classList.add("here");
    block.parentNode.append(block); // its outline lies above its neighbours
    const { level, row, column, size } = Object.fromEntries(Object.entries(block.dataset).map(([k, v]) => [k, +v]));
    const span = (from) => (size > 1 ? `${from} to ${from + size - 1}` : `${from}`);
    const what = level ? `queries ${span(row)} read the state of tokens ${span(column)}` : `token ${row} reads itself`;
    readout.textContent = `Level ${level}: ${what}, with weight ${weights ? byLevel(weights, level).toPrecision(3) : 1}.`;
  };

  // From a block to the one that holds the cell beside it.
  const at = (row, column) =>
    blocks.find(({ dataset: d }) =>
      row >= +d.row && row < +d.row + +d.size && column >= +d.column && column < +d.column + +d.size);
  const moves = {
    ArrowLeft: (d) => at(+d.row, +d.column - 1),
    ArrowRight: (d) => at(+d.row, +d.column + +d.size),
    ArrowUp: (d) => at(+d.row - 1, +d.column),
    ArrowDown: (d) => at(+d.row + +d.size, +d.column),
  };
  mask.addEventListener("pointerover", (event) => event.target.matches("rect") && say(event.target));
  mask.addEventListener("focus", () => current || say(at(blocks.length ? 0 : -1, 0)));
  mask.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || !current) return;
    event.preventDefault();
    const next = move(current.dataset);
    if (next) say(next);
  });

  for (const button of levels.querySelectorAll("button[data-head]")) {
    button.addEventListener("click", () => {
      const chosen = button.getAttribute("aria-pressed") !== "true";
      for (const other of levels.querySelectorAll("button[data-head]")) other.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", String(chosen));
      const numbers = (text) => text.split(" ").map(Number);
      weights = chosen ? numbers(button.dataset.weights) : null;
      const painted = chosen ? numbers(button.dataset.shades) : null;
      blocks.forEach((block, i) =>
        block.style.setProperty("--shade", painted ? byLevel(painted, +block.dataset.level) : shades[i]));
      if (current) say(current);
    });
  }
}
