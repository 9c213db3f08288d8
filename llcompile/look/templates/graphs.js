// Zoom and pan. A drawing lies in a box that scrolls, so that it can be read without this script; zooming changes the
// drawing's width, panning the box's scroll position.
const ZOOM = { least: 0.1, most: 4, step: 1.25 };

/** @param {HTMLElement} scroll the box around one drawing */
function zoomable(scroll) {
  const svg = scroll.querySelector("svg");
  const figure = scroll.closest("figure");
  const { width, height } = svg.viewBox.baseVal;
  const shown = figure.querySelector("output");

  const scale = () => svg.getBoundingClientRect().width / width;
  const tell = () => { shown.textContent = `${Math.round(100 * scale())} %`; };

  /** Zooms so that what lies at (x, y) of the window stays there; at the middle of the box if no place is given. */
  const zoom = (wanted, x, y) => {
    const room = scroll.getBoundingClientRect();
    const [fixedX, fixedY] = [x ?? room.left + room.width / 2, y ?? room.top + room.height / 2];
    const old = svg.getBoundingClientRect();
    const before = scale();
    const after = Math.min(Math.max(wanted, ZOOM.least), ZOOM.most);
    svg.style.width = `${width * after}px`;
    const now = svg.getBoundingClientRect();
    scroll.scrollLeft += now.left + ((fixedX - old.left) * after) / before - fixedX;
    scroll.scrollTop += now.top + ((fixedY - old.top) * after) / before - fixedY;
    tell();
  };
  const fit = () => zoom(Math.min((scroll.clientWidth - 20) / width, (scroll.clientHeight - 20) / height, 1));
  const enlarge = () => {
    const large = figure.classList.toggle("large");
    figure.querySelector("[data-do=enlarge]").setAttribute("aria-pressed", String(large));
    tell();
  };
  const actions = {
    in: () => zoom(scale() * ZOOM.step), out: () => zoom(scale() / ZOOM.step), fit, full: () => zoom(1), enlarge,
  };
  const keys = { "+": "in", "=": "in", "-": "out", 0: "fit", 1: "full" };

  const tools = figure.querySelector(".tools");
  tools.hidden = false;
  tools.addEventListener("click", (event) => actions[event.target.closest("[data-do]")?.dataset.do]?.());
  scroll.addEventListener("keydown", (event) => {
    const action = actions[keys[event.key]];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
  // The wheel alone scrolls the page; trackpads send a pinch as a wheel with Ctrl.
  scroll.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(scale() * Math.exp(-event.deltaY / 300), event.clientX, event.clientY);
  }, { passive: false });

  const onScrollbar = ({ clientX, clientY }) => {
    const room = scroll.getBoundingClientRect();
    return clientX - room.left - scroll.clientLeft >= scroll.clientWidth
      || clientY - room.top - scroll.clientTop >= scroll.clientHeight;
  };
  // Fingers scroll by themselves; a mouse drags.
  let last = null;
  scroll.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0 || onScrollbar(event)) return;
    last = [event.clientX, event.clientY];
    scroll.setPointerCapture(event.pointerId);
  });
  scroll.addEventListener("pointermove", (event) => {
    if (!(event.buttons & 1)) last = null; // let go where no event tells
    if (!last) return;
    scroll.scrollLeft -= event.clientX - last[0];
    scroll.scrollTop -= event.clientY - last[1];
    last = [event.clientX, event.clientY];
  });
  for (const end of ["pointerup", "pointercancel"]) scroll.addEventListener(end, () => { last = null; });

  const middle = svg.querySelector(".operator") ?? svg.querySelector(".inside");
  if (middle) { // a wide drawing opens at the mixer
    const box = middle.getBoundingClientRect(), room = scroll.getBoundingClientRect();
    scroll.scrollLeft += box.left + box.width / 2 - room.left - room.width / 2;
  }
  tell();
}

for (const scroll of document.querySelectorAll("figure > .graph")) zoomable(scroll);
