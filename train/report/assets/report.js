"use strict";
// Draws the plots from the JSON in #data. Texts of runs reach the page as text only, never as HTML
// that is made here.
(() => {
  const root = document.documentElement;
  const state = JSON.parse(document.getElementById("data").textContent);
  const shownMarks = new Set();
  const hidden = new Set();  // curves that the legends have switched off
  const logarithmic = new Set();
  const plots = new Map();
  const HEIGHT = 250;
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [4, 8]];
  const SIGNS = { attempt: "▸", fault: "✕", stop: "■", skipped: "○", checkpoint: "▴" };
  const COLOURS = {
    attempt: "--accent", fault: "--bad", stop: "--warn", skipped: "--warn", checkpoint: "--quiet",
  };
  const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600,
    43200, 86400, 172800, 432800, 864000];
  let axis = "x";

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const element = (name, attributes = {}, ...content) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...content);
    return made;
  };

  function number(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) {
      return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    return String(Number(value.toPrecision(5)));
  }

  function time(seconds) {
    const whole = Math.round(seconds);
    const two = (part) => String(part).padStart(2, "0");
    const clock = `${Math.floor(whole / 60) % 60}:${two(whole % 60)}`;
    if (whole < 3600) return clock;
    const hours = Math.floor(whole / 3600);
    return hours < 100 ? `${hours}:${two(Math.floor(whole / 60) % 60)} h`
      : `${Math.round(hours / 24)} d`;
  }

  const axisText = (value) => (axis === "t" ? time(value) : value.toLocaleString("en"));

  // One run: a colour per curve. Several: a colour per run, a dash pattern per metric.
  function looks(figure) {
    const metrics = [...new Set(figure.series.map((one) => one.metric))];
    const several = state.runs.length > 1;
    return figure.series.map((one, index) => {
      const kind = metrics.indexOf(one.metric);
      return {
        label: several
          ? `${state.runs[one.run].label}${metrics.length > 1 ? ` · ${one.metric}` : ""}`
          : one.metric,
        stroke: colour(`--run-${(several ? one.run : index) % 8}`),
        dash: DASHES[(several ? kind + metrics.length * Math.floor(one.run / 8)
          : Math.floor(index / 8)) % DASHES.length],
      };
    });
  }

  function columns(figure) {
    const tables = figure.series.map((one) => [
      state.runs[one.run].axes[one.axis][axis], one.y,
    ]);
    return tables.length > 1 ? uPlot.join(tables) : tables[0];
  }

  function drawMarks(plot, figure) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio || 1;
    const { min, max } = plot.scales.x;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 4 * ratio, bbox.top - 12 * ratio, bbox.width + 8 * ratio,
      bbox.height + 12 * ratio);
    ctx.clip();
    ctx.font = `${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    for (const run of new Set(figure.series.map((one) => one.run))) {
      let lastLabel = -Infinity;
      for (const mark of state.runs[run].marks) {
        const at = mark[axis];
        if (at === null || at < min || at > max || !shownMarks.has(mark.kind) || mark.first) continue;
        const x = plot.valToPos(at, "x", true);
        ctx.fillStyle = ctx.strokeStyle = colour(COLOURS[mark.kind]);
        if (mark.kind === "checkpoint") {
          const y = bbox.top + bbox.height;
          ctx.beginPath();
          ctx.moveTo(x, y - 8 * ratio);
          ctx.lineTo(x - 4 * ratio, y);
          ctx.lineTo(x + 4 * ratio, y);
          ctx.fill();
          continue;
        }
        ctx.lineWidth = ratio;
        ctx.setLineDash(mark.kind === "attempt" ? [] : [4 * ratio, 3 * ratio]);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        const label = mark.kind === "attempt" ? `▸${mark.attempt}` : SIGNS[mark.kind];
        // Two marks at one step stand side by side.
        const place = Math.max(x, lastLabel + 16 * ratio);
        ctx.fillText(label, place, bbox.top - 3 * ratio);
        lastLabel = place;
      }
    }
    ctx.restore();
  }

  function read(plot, figure, readout) {
    const index = plot.cursor.idx;
    if (index === null || index === undefined) {
      readout.textContent = "";
      return;
    }
    const at = plot.data[0][index];
    const parts = [axis === "t" ? `${time(at)} after the start` : `step ${at.toLocaleString("en")}`];
    looks(figure).forEach((look, position) => {
      if (!plot.series[position + 1].show) return;
      const values = plot.data[position + 1];
      for (let i = index; i >= 0; i -= 1) {
        if (values[i] !== undefined) {
          parts.push(`${look.label} ${values[i] === null ? "not finite" : number(values[i])}`);
          break;
        }
      }
    });
    const near = (plot.scales.x.max - plot.scales.x.min) / 120;
    for (const run of new Set(figure.series.map((one) => one.run))) {
      for (const mark of state.runs[run].marks) {
        const close = mark[axis] !== null && Math.abs(mark[axis] - at) <= near;
        if (close && shownMarks.has(mark.kind) && mark.kind !== "checkpoint" && parts.length < 12) {
          parts.push(state.runs.length > 1 ? `${state.runs[run].label}: ${mark.text}` : mark.text);
        }
      }
    }
    readout.textContent = parts.join("  ·  ");
  }

  function build(figure) {
    const box = document.getElementById(figure.id);
    const canvas = box.querySelector(".canvas");
    const readout = box.querySelector(".readout");
    plots.get(figure.id)?.destroy();
    const appearance = looks(figure);
    const data = columns(figure);
    const grid = { stroke: colour("--grid"), width: 1 };
    const axisLook = {
      stroke: colour("--soft"), grid, ticks: grid, font: "12px system-ui, sans-serif",
    };
    const isLog = logarithmic.has(figure.id);
    const plot = new uPlot({
      width: Math.max(canvas.clientWidth, 120),
      height: HEIGHT,
      padding: [16, 12, 0, 0],
      legend: { show: false },
      cursor: {
        sync: { key: "isorun" }, drag: { x: true, y: false }, focus: { prox: 24 },
        points: { size: 7 },
      },
      focus: { alpha: 0.35 },
      scales: { x: { time: false }, y: isLog ? { distr: 3 } : {} },
      axes: [
        {
          ...axisLook, space: 64, size: 34, ...(axis === "t" ? { incrs: TIMES } : {}),
          values: (_, splits) => splits.map(axisText),
        },
        {
          ...axisLook, space: 36,
          values: (_, splits) => splits.map((value) => (value === null ? "" : number(value))),
          size: (_, values) => 20 + 7 * Math.max(2, ...(values || []).map((v) => v.length)),
        },
      ],
      series: [{}, ...figure.series.map((one, index) => ({
        label: appearance[index].label,
        stroke: appearance[index].stroke,
        dash: appearance[index].dash,
        width: 1.75,
        show: !hidden.has(key(figure, one)),
        points: { show: one.y.length <= 60, size: 5 },
      }))],
      hooks: {
        draw: [(self) => drawMarks(self, figure)],
        setCursor: [(self) => read(self, figure, readout)],
        setScale: [(self, name) => {
          if (name !== "x") return;
          const { min, max } = self.scales.x;
          const xs = self.data[0];
          box.querySelector(".reset").hidden = !(min > xs[0] || max < xs[xs.length - 1]);
        }],
      },
    }, data, canvas);
    plots.set(figure.id, plot);
  }

  const key = (figure, one) => JSON.stringify([figure.id, one.run, one.metric]);

  function swatch(look) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const attributes = { x1: 0, x2: 22, y1: 6, y2: 6, "stroke-width": 3, stroke: look.stroke,
      "stroke-dasharray": look.dash.join(" ") };
    for (const [name, value] of Object.entries({ width: 22, height: 12, "aria-hidden": true })) {
      made.setAttribute(name, value);
    }
    for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
    made.append(line);
    return made;
  }

  function legend(figure) {
    const box = document.getElementById(figure.id).querySelector(".legend");
    box.replaceChildren(...looks(figure).map((look, index) => {
      const one = key(figure, figure.series[index]);
      const button = element("button", { type: "button", "aria-pressed": String(!hidden.has(one)) },
        swatch(look), look.label);
      button.addEventListener("click", () => {
        const show = hidden.delete(one);
        if (!show) hidden.add(one);
        button.setAttribute("aria-pressed", String(show));
        plots.get(figure.id).setSeries(index + 1, { show });
      });
      return button;
    }));
  }

  function buildAll() {
    for (const figure of state.figures) {
      build(figure);
      legend(figure);
    }
  }

  function resetZoom() {
    for (const plot of plots.values()) plot.setData(plot.data);
  }

  function prepare(figure) {
    const box = document.getElementById(figure.id);
    const canvas = box.querySelector(".canvas");
    const readout = box.querySelector(".readout");
    box.querySelector(".reset").addEventListener("click", resetZoom);
    box.querySelector(".log")?.addEventListener("click", (event) => {
      const on = !logarithmic.delete(figure.id);
      if (on) logarithmic.add(figure.id);
      event.currentTarget.setAttribute("aria-pressed", String(on));
      build(figure);
    });
    canvas.addEventListener("focus", () => readout.setAttribute("aria-live", "polite"));
    canvas.addEventListener("blur", () => readout.setAttribute("aria-live", "off"));
    canvas.addEventListener("keydown", (event) => {
      const plot = plots.get(figure.id);
      const last = plot.data[0].length - 1;
      const stride = Math.max(1, Math.round(last / 100));
      const now = plot.cursor.idx ?? -1;
      const next = {
        ArrowLeft: Math.max(0, now - stride), ArrowRight: Math.min(last, now + stride),
        Home: 0, End: last,
      }[event.key];
      if (event.key === "Escape") resetZoom();
      if (next === undefined) return;
      event.preventDefault();
      const left = plot.valToPos(plot.data[0][next], "x");
      plot.setCursor({ left, top: plot.over.clientHeight / 2 });
    });
    new ResizeObserver(() => {
      const plot = plots.get(figure.id);
      const width = Math.max(canvas.clientWidth, 120);
      if (plot && plot.width !== width) plot.setSize({ width, height: HEIGHT });
    }).observe(canvas);
  }

  // Theme: that of the system, until the button chooses one.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["system", "light", "dark"];
  let theme = "system";
  function applyTheme() {
    const name = theme === "system" ? (dark.matches ? "dark" : "light") : theme;
    root.dataset.theme = name;
    document.getElementById("theme").textContent = `Theme: ${theme}`;
    buildAll();
  }
  document.getElementById("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    applyTheme();
  });
  dark.addEventListener("change", applyTheme);

  for (const input of document.querySelectorAll("#controls input")) {
    if (input.name === "marks" && input.checked) shownMarks.add(input.value);
    input.addEventListener("change", () => {
      if (input.name === "axis") {
        axis = input.value;
        buildAll();
      } else {
        if (input.checked) shownMarks.add(input.value);
        else shownMarks.delete(input.value);
        for (const plot of plots.values()) plot.redraw();
      }
    });
  }
  document.getElementById("controls").hidden = state.figures.length === 0;
  state.figures.forEach(prepare);
  applyTheme();
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details")) each.open = true;
  });

  // --watch: asks the server that sent this page.
  function replace(id, html) {
    const box = document.getElementById(id);
    if (!box || box.contains(document.activeElement)) return;
    const open = new Map([...box.querySelectorAll("details[id]")].map((d) => [d.id, d.open]));
    box.innerHTML = html;  // escaped by the server, like the page itself
    for (const details of box.querySelectorAll("details[id]")) {
      if (open.has(details.id)) details.open = open.get(details.id);
    }
  }

  async function update() {
    const live = document.getElementById("live");
    try {
      const answer = await fetch(`data.json?since=${state.version}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const news = await answer.json();
      if (news.drawn) {
        const names = (figures) => JSON.stringify(figures.map((figure) => [
          figure.title, figure.series.map((one) => [one.run, one.metric]),
        ]));
        if (names(news.drawn.figures) !== names(state.figures)) {
          location.reload();
          return;
        }
        Object.assign(state, news.drawn, { version: news.version });
        for (const [id, html] of Object.entries(news.html)) replace(id, html);
        for (const figure of state.figures) plots.get(figure.id).setData(columns(figure));
      }
      live.textContent = news.over ? "The run has ended" : "Live: in progress";
      live.classList.toggle("over", news.over);
      if (!news.over) setTimeout(update, 2000);
    } catch {
      live.textContent = "The server has ended";
      live.classList.add("over");
    }
  }
  if (state.live) setTimeout(update, 2000);
})();
