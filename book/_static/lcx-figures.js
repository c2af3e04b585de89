// Draws the figures of a page from the JSON that the page holds, with HTML controls, a data table and "predict first".
(() => {
  const here = document.currentScript.src.replace(/lcx-figures\.js.*$/, "");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const STEP_MS = 600;
  let library;

  const plotly = () => (library ??= new Promise((ok, bad) => {
    const script = document.createElement("script");
    script.src = here + "plotly.min.js";
    script.onload = ok;
    script.onerror = () => bad(new Error("plotly.min.js did not load"));
    document.head.append(script);
  }));

  // make("button", {class: "a", type: "button"}, "text", child…)
  function make(tag, attributes = {}, ...children) {
    const el = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) el.setAttribute(name, value);
    el.append(...children);
    return el;
  }

  const plain = (v) => v !== null && typeof v === "object" && !Array.isArray(v) && !("bdata" in v);
  function merged(base, change) {
    if (!plain(base) || !plain(change)) return change;
    const out = { ...base };
    for (const [key, value] of Object.entries(change)) out[key] = merged(base[key], value);
    return out;
  }

  const number = (v) => (Math.abs(v) >= 1e-3 || v === 0)
    ? v.toLocaleString("en", { maximumSignificantDigits: 4 }) : v.toPrecision(3);
  const withUnit = (v, unit) => number(v) + (unit ? ` ${unit}` : "");

  // ---- one figure -------------------------------------------------------------------------------------------------
  class Figure {
    constructor(root) {
      this.root = root;
      this.body = root.querySelector(".lcx-body");
      this.plot = root.querySelector(".lcx-plot");
      this.spec = JSON.parse(root.querySelector("script").textContent);
      this.meta = this.spec.layout.meta || {};
      this.controls = this.meta.controls || [];
      this.at = this.controls.map((c) => c.start);
      this.frames = new Map((this.spec.frames || []).map((f) => [f.name, f]));
      this.guess = null;
      this.addControls();
      this.addTable();
      if (this.meta.predict) this.addPredict(this.meta.predict);
    }

    // What is on show: the base figure, changed by the frame of the present controls, plus the reader's guess.
    now() {
      const { sliders, updatemenus, ...layout } = structuredClone(this.spec.layout);
      const state = { data: structuredClone(this.spec.data), layout };
      if (!this.controls.length) Object.assign(layout, sliders && { sliders }, updatemenus && { updatemenus });
      const frame = structuredClone(this.frames.get(this.at.join(".")));
      if (frame) {
        (frame.data || []).forEach((change, i) => {
          const trace = (frame.traces || [])[i] ?? i;
          state.data[trace] = merged(state.data[trace], change);
        });
        state.layout = merged(state.layout, frame.layout || {});
      }
      if (this.guess !== null) state.layout.shapes = [...(state.layout.shapes || []), this.guessLine()];
      state.layout.uirevision = "reader";
      if (matchMedia("(pointer: coarse)").matches) state.layout.dragmode = false; // a finger scrolls the page
      return { data: state.data, layout: painted(state.layout) };
    }

    async draw() {
      try {
        await plotly();
        const { data, layout } = this.now();
        const config = { ...this.spec.config, responsive: true, displayModeBar: false, showSendToCloud: false };
        await Plotly.react(this.plot, data, layout, config);
        this.plot.setAttribute("role", "img");
        this.plot.setAttribute("aria-label", this.meta.alt || "figure");
        this.root.dataset.ready = "1";
        this.root.dataset.state = this.at.join(".");
        if (this.table.open) this.fillTable();
      } catch (error) {
        this.plot.replaceChildren(make("p", { class: "lcx-note" }, `This figure could not be drawn (${error.message}). Its description and its data are below.`));
        throw error;
      }
    }

    redraw() {
      return this.root.dataset.ready ? this.draw() : Promise.resolve();
    }

    // ---- controls ---------------------------------------------------------------------------------------------------
    addControls() {
      if (!this.controls.length) return;
      this.panel = make("form", { class: "lcx-controls", "aria-label": "Controls of the figure" });
      this.panel.addEventListener("submit", (event) => event.preventDefault());
      this.inputs = this.controls.map((c, i) => this.addControl(c, i));
      if (this.meta.play) this.addPlay();
      this.body.insertBefore(this.panel, this.plot.nextSibling);
    }

    addControl(control, i) {
      const value = make("output", { "aria-live": "off" }, control.values[control.start]);
      const slider = control.kind === "slider";
      const input = slider
        ? make("input", { type: "range", min: 0, max: control.values.length - 1, step: 1, value: control.start })
        : make("select", {}, ...control.values.map((text, k) => make("option", { value: k }, text)));
      input.value = control.start;
      const show = () => {
        value.textContent = control.values[this.at[i]];
        if (slider) input.setAttribute("aria-valuetext", value.textContent);
      };
      input.addEventListener("input", () => {
        this.stop?.();
        this.at[i] = Number(input.value);
        show();
        this.redraw();
      });
      const name = make("span", { class: "lcx-name" }, control.name);
      this.panel.append(make("label", {}, slider ? make("span", { class: "lcx-head" }, name, " ", value) : name, input));
      show();
      return { input, show };
    }

    addPlay() {
      const [first] = this.controls;
      const last = first.values.length - 1;
      const label = () => (calm.matches ? "Next step" : "Play");
      const button = make("button", { type: "button", class: "lcx-button" }, label());
      calm.addEventListener("change", () => this.stop());
      let timer = null;
      const go = (k) => {
        this.at[0] = k;
        this.inputs[0].input.value = k;
        this.inputs[0].show();
        return this.redraw();
      };
      const step = async () => {
        await go(this.at[0] + 1);
        if (this.at[0] >= last) this.stop();
        else if (timer !== null) timer = setTimeout(step, STEP_MS);
      };
      this.stop = () => {
        clearTimeout(timer);
        timer = null;
        button.textContent = label();
      };
      button.addEventListener("click", async () => {
        if (timer !== null) return this.stop();
        if (calm.matches) return go((this.at[0] + 1) % (last + 1)); // no motion that the reader did not ask for
        button.textContent = "Pause";
        timer = setTimeout(step, STEP_MS);
        if (this.at[0] >= last) await go(0);
      });
      this.panel.append(button);
    }

    // ---- the data behind the figure ---------------------------------------------------------------------------------
    addTable() {
      this.table = make("details", { class: "lcx-data" }, make("summary", {}, "Data of this figure"));
      this.holder = make("div", { class: "lcx-tables", tabindex: 0, role: "region", "aria-label": "Data of this figure" });
      this.table.append(this.holder);
      this.table.addEventListener("toggle", async () => {
        if (!this.table.open) return;
        if (!this.root.dataset.ready) await this.draw();
        this.fillTable();
      });
      this.body.append(this.table);
    }

    fillTable() {
      this.holder.replaceChildren(...tables(this.plot));
    }

    // ---- predict first ----------------------------------------------------------------------------------------------
    addPredict(p) {
      const scale = p.log ? { to: Math.log, from: Math.exp } : { to: (v) => v, from: (v) => v };
      const [low, high] = [scale.to(p.low), scale.to(p.high)];
      const steps = 200;
      const value = (k) => {
        const exact = scale.from(low + ((high - low) * k) / steps);
        const digits = p.log ? Math.floor(Math.log10(exact)) - 1 : Math.floor(Math.log10((p.high - p.low) / steps));
        return Math.min(p.high, Math.max(p.low, Number((Math.round(exact / 10 ** digits) * 10 ** digits).toPrecision(12))));
      };
      const start = p.start === null || p.start === undefined ? steps / 2 : Math.round(((scale.to(p.start) - low) / (high - low)) * steps);
      const output = make("output", { "aria-live": "off" });
      const range = make("input", { type: "range", min: 0, max: steps, step: 1, value: start });
      const show = () => {
        output.textContent = withUnit(value(range.value), p.unit);
        range.setAttribute("aria-valuetext", output.textContent);
      };
      range.addEventListener("input", show);
      const answer = make("button", { type: "button", class: "lcx-button" }, "Show the answer");
      const skip = make("button", { type: "button", class: "lcx-button lcx-quiet" }, "Skip the guess");
      const form = make("form", { class: "lcx-controls" },
        make("label", {}, make("span", { class: "lcx-head" }, make("span", { class: "lcx-name" }, "Your guess"), " ", output), range), answer, skip);
      form.addEventListener("submit", (event) => event.preventDefault());
      const verdict = make("p", { class: "lcx-verdict", role: "status" });
      const card = make("div", { class: "lcx-card lcx-predict", role: "group", "aria-label": "Predict" }, make("p", { class: "lcx-question" }, p.question), form, verdict);
      this.root.prepend(card);
      this.body.hidden = true;
      show();
      const reveal = (guess) => {
        this.guess = guess;
        form.remove();
        verdict.tabIndex = -1;
        verdict.textContent = this.verdict(p, guess);
        this.body.hidden = false;
        verdict.focus();
        this.draw();
      };
      answer.addEventListener("click", () => reveal(value(range.value)));
      skip.addEventListener("click", () => reveal(null));
    }

    verdict(p, guess) {
      const truth = `The answer is ${withUnit(p.truth, p.unit)}.`;
      if (guess === null) return truth;
      const off = p.log
        ? (guess >= p.truth ? `${number(guess / p.truth)} times the answer` : `the answer is ${number(p.truth / guess)} times as much`)
        : `${withUnit(Math.abs(guess - p.truth), p.unit)} too ${guess > p.truth ? "high" : "low"}`;
      const close = Math.abs(guess - p.truth) <= 0.02 * (p.log ? Math.abs(p.truth) : p.high - p.low);
      return `${truth} You guessed ${withUnit(guess, p.unit)}${close ? ": as good as exact." : `: ${off}.`}`;
    }

    guessLine() {
      const p = this.meta.predict;
      const pick = p.log ? Math.log : (v) => v;
      const late = pick(this.guess) - pick(p.low) > (pick(p.high) - pick(p.low)) / 2;
      const label = { text: `your guess: ${withUnit(this.guess, p.unit)}`, textangle: 0, textposition: "end" };
      const line = { color: "#D55E00", dash: "dash", width: 2 };
      return p.axis === "x"
        ? { type: "line", name: "guess", x0: this.guess, x1: this.guess, xref: "x", y0: 0, y1: 1, yref: "paper", line, label: { ...label, xanchor: late ? "right" : "left", yanchor: "top" } }
        : { type: "line", name: "guess", y0: this.guess, y1: this.guess, yref: "y", x0: 0, x1: 1, xref: "paper", line, label: { ...label, xanchor: "right", yanchor: late ? "top" : "bottom" } };
    }
  }

  // ---- colours of the page ------------------------------------------------------------------------------------------
  function painted(layout) {
    const css = getComputedStyle(document.documentElement);
    const text = css.getPropertyValue("--pst-color-text-base").trim();
    const muted = css.getPropertyValue("--pst-color-text-muted").trim();
    const clear = "rgba(0,0,0,0)";
    layout.font = { ...layout.font, color: text };
    layout.paper_bgcolor = layout.plot_bgcolor = clear;
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = { ...layout[key], linecolor: muted, tickcolor: muted };
      if (/^scene\d*$/.test(key)) {
        const axes = ["xaxis", "yaxis", "zaxis"].map((a) => [a, { ...layout[key][a], color: text, gridcolor: muted, backgroundcolor: clear }]);
        layout[key] = { ...layout[key], bgcolor: clear, ...Object.fromEntries(axes) };
      }
      if (/^polar\d*$/.test(key)) {
        const axes = ["radialaxis", "angularaxis"].map((a) => [a, { ...layout[key][a], color: text }]);
        layout[key] = { ...layout[key], bgcolor: clear, ...Object.fromEntries(axes) };
      }
    }
    return layout;
  }

  // ---- tables -------------------------------------------------------------------------------------------------------
  const MAX_ROWS = 300;
  const isList = (v) => Array.isArray(v) || ArrayBuffer.isView(v);
  const cellText = (v) => (v === null || v === undefined ? "" : typeof v === "number" ? String(Number(v.toPrecision(6))) : String(v).replace(/<[^>]+>/g, " "));
  const same = (a, b) => a.length === b.length && Array.from(a).every((v, i) => v === b[i]);

  function table(caption, heads, rows) {
    const shown = rows.slice(0, MAX_ROWS);
    const body = make("tbody", {}, ...shown.map((row) => make("tr", {}, make("th", { scope: "row" }, cellText(row[0])), ...row.slice(1).map((v) => make("td", {}, cellText(v))))));
    const words = rows.length > shown.length ? `${caption} (the first ${MAX_ROWS} of ${rows.length} rows)` : caption;
    const head = make("thead", {}, make("tr", {}, ...heads.map((h) => make("th", { scope: "col" }, cellText(h)))));
    return make("table", {}, make("caption", {}, words), head, body);
  }

  function tables(plot) {
    const layout = plot._fullLayout;
    const title = (t, axis) => layout[(t[`${axis}axis`] || axis).replace(/^([xyz])/, "$1axis")]?.title?.text || axis;
    const seen = plot._fullData.filter((t) => t.visible === true);
    const name = (t, i) => t.name || `series ${i + 1}`;
    const lines = seen.filter((t) => isList(t.x) && isList(t.y) && !isList(t.z));
    const out = [];
    const shared = lines.length > 1 && lines.every((t) => same(t.x, lines[0].x) && !t.error_y?.array);
    if (shared) {
      const rows = Array.from(lines[0].x, (x, r) => [x, ...lines.map((t) => t.y[r])]);
      out.push(table(title(lines[0], "y"), [title(lines[0], "x"), ...lines.map(name)], rows));
    }
    seen.forEach((t, i) => {
      if (shared && lines.includes(t)) return;
      if (isList(t.z) && isList(t.z[0])) {
        const xs = isList(t.x) ? Array.from(t.x) : Array.from(t.z[0], (_, k) => k);
        const rows = Array.from(t.z, (row, r) => [isList(t.y) ? t.y[r] : r, ...row]);
        out.push(table(t.name || t.colorbar?.title?.text || "values", [`${title(t, "y")} \\ ${title(t, "x")}`, ...xs], rows));
        return;
      }
      const columns = ["x", "y", "z", "labels", "values", "r", "theta", "text"].filter((c) => isList(t[c]) && t[c].length);
      const heads = columns.map((c) => (c === "x" || c === "y" ? title(t, c) : c));
      const lists = columns.map((c) => t[c]);
      if (isList(t.error_y?.array)) {
        heads.push(isList(t.error_y.arrayminus) ? "error up" : "error");
        lists.push(t.error_y.array);
        if (isList(t.error_y.arrayminus)) heads.push("error down"), lists.push(t.error_y.arrayminus);
      }
      if (!lists.length) return;
      const length = Math.max(...lists.map((l) => l.length));
      out.push(table(name(t, i), heads, Array.from({ length }, (_, r) => lists.map((l) => l[r]))));
    });
    return out;
  }

  // ---- the page -----------------------------------------------------------------------------------------------------
  const figures = new Map(Array.from(document.querySelectorAll(".lcx-figure"), (el) => [el, new Figure(el)]));
  const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
    const figure = figures.get(entry.target);
    if (!entry.isIntersecting || figure.body.hidden) return;
    watcher.unobserve(entry.target);
    if (!figure.root.dataset.ready) figure.draw();
  }), { rootMargin: "600px" });
  figures.forEach((_, el) => watcher.observe(el));
  new MutationObserver(() => figures.forEach((figure) => figure.redraw()))
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  addEventListener("beforeprint", () => figures.forEach((figure) => figure.body.hidden || figure.draw()));
})();
