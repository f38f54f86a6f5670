// Drives NiiVue (the global `niivue`) by the controls of viewer.html.j2. The volumes of a case stand in an element of
// their own as packed NIfTI in base64: image, prediction, reference. The prediction is a layer that is filled. The
// reference is NiiVue's drawing, the one layer whose outline is as thin as a pixel of the screen. What differs between
// them is a third layer, made here.
(function () {
  "use strict";
  const element = name => document.getElementById("viewer-" + name);
  const facts = JSON.parse(element("facts").textContent);
  const PREDICTION = 1, ERRORS = 2;
  const MISSED = [255, 59, 92], SPURIOUS = [46, 230, 214], OTHER = [255, 255, 255];
  // Too faint to be seen; at 0 NiiVue leaves out the outline too.
  const FAINT = 0.004;
  // How dense the image is around the structures in 3-D.
  const VEIL = 0.3;
  const hidden = new Set();
  let viewer, current = -1, turn = 0, view = "all", bare = false, maps = {}, drawn = null;

  function begin() {
    if (!document.createElement("canvas").getContext("webgl2")) {
      element("title").textContent = "This browser has no WebGL 2, which the viewer needs: the pictures below do without.";
      document.getElementById("viewer").classList.add("without");
      return;
    }
    thickenOutlines();
    viewer = new niivue.Niivue({
      logLevel: "error", backColor: [0, 0, 0, 1], crosshairColor: [0.45, 0.78, 1, 0.55], crosshairWidth: 0.25,
      crosshairWidthUnit: "percent", crosshairGap: 8, show3Dcrosshair: false, fontColor: [0.72, 0.78, 0.84, 1],
      fontSizeScaling: 0.3, isRadiologicalConvention: true, multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
      multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID, multiplanarPadPixels: 6, dragAndDropEnabled: false,
      scrollRequiresFocus: true, clipPlaneHotKey: "", viewModeHotKey: "", cycleClipPlaneHotKey: "", loadingText: "",
    });
    viewer.onLocationChange = tell;
    viewer.attachToCanvas(element("canvas")).then(() => {
      listen();
      turnTo(view);
      show(facts.cases.findIndex(one => one.shown));
    });
  }

  // NiiVue's outline is one pixel wide: its shader compares a pixel with the next ones. Compare with those beyond.
  function thickenOutlines() {
    const original = WebGL2RenderingContext.prototype.shaderSource;
    WebGL2RenderingContext.prototype.shaderSource = function (shader, text) {
      original.call(this, shader, text.replace(/= (dFd[xy]\(texPos\));/g, "= 1.6 * $1;"));
    };
  }

  // Cases

  async function show(index) {
    const mine = ++turn, one = facts.cases[index];
    current = index;
    element("waiting").hidden = false;
    element("title").textContent = one.name;
    element("grid").textContent = [describe(one), one.grid].filter(Boolean).join(" \u00b7 ");
    for (const button of element("cases").querySelectorAll("button")) {
      const chosen = Number(button.dataset.case) === index;
      button.setAttribute("aria-current", chosen);
      if (chosen) keepInSight(button);
    }
    element("previous").disabled = neighbour(-1) < 0;
    element("next").disabled = neighbour(1) < 0;
    const texts = element("volumes-" + index).textContent.trim().split(" ");
    const volumes = await Promise.all(texts.map((text, at) => read(text, at ? "labels" : "image", one)));
    if (mine !== turn) return;
    lay(volumes, one);
    element("waiting").hidden = true;
    element("canvas").dataset.shown = one.name;
  }

  function describe(one) {
    const scores = Object.entries(one.by_class).map(([name, value]) => name + " " + value.toFixed(4));
    const mean = one.score === null ? [] : [facts.score + " " + one.score.toFixed(4)];
    return mean.concat(scores.length > 1 && scores.length < 7 ? scores : []).join(", ");
  }

  function keepInSight(button) {
    const list = element("cases").parentElement;
    const above = button.offsetTop - list.offsetTop, below = above + button.offsetHeight;
    if (above < list.scrollTop) list.scrollTop = above;
    if (below > list.scrollTop + list.clientHeight) list.scrollTop = below - list.clientHeight;
  }

  function neighbour(step) {
    let at = current + step;
    while (facts.cases[at] && !facts.cases[at].shown) at += step;
    return facts.cases[at] ? at : -1;
  }

  function go(step) {
    const at = neighbour(step);
    if (at >= 0) show(at);
  }

  function read(base64, name, one) {
    const window_ = name === "image" ? { colormap: "gray", cal_min: one.window[0], cal_max: one.window[1] } : {};
    return niivue.NVImage.loadFromBase64({ base64, name: name + ".nii.gz", ...window_ });
  }

  function lay([image, prediction, reference], one) {
    const overlays = reference ? [prediction, differences(prediction, reference, one.unknown)] : [prediction];
    viewer.volumes = [image, ...overlays];
    viewer.back = image;
    viewer.overlays = overlays;
    maps = { prediction, reference };
    drawn = null;
    once(() => {
      viewer.refreshLayers(image, 0); // the grid, which the cross and the drawing go by
      viewer.scene.crosshairPos = viewer.mm2frac(one.focus);
      layer();
    });
    viewer.createOnLocationChange();
  }

  // NiiVue draws after each step, in 3-D too; after all of them is enough.
  function once(steps) {
    viewer.drawScene = () => {};
    try {
      steps();
    } finally {
      delete viewer.drawScene;
    }
    viewer.drawScene();
  }

  // 1 missed, 2 spurious, 3 another structure; of what the reference says nothing of, nothing differs.
  function differences(prediction, reference, unknown) {
    const errors = prediction.clone();
    errors.img = prediction.img.map((p, at) => {
      const r = reference.img[at];
      if (p === r || unknown.includes(p) || unknown.includes(r)) return 0;
      return p === 0 ? 1 : r === 0 ? 2 : 3;
    });
    errors.name = "errors.nii.gz";
    return errors;
  }

  // Layers

  function table(colours, alphas) {
    return {
      R: [0, ...colours.map(c => c[0])], G: [0, ...colours.map(c => c[1])], B: [0, ...colours.map(c => c[2])],
      A: [0, ...alphas], I: [0, ...colours.map((_, at) => at + 1)],
    };
  }

  function rgb(colour) {
    return [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  }

  function on(name) {
    return !bare && Boolean(element(name)) && element(name).checked;
  }

  function paint() {
    if (viewer.volumes.length) once(layer);
  }

  // Bring every layer to what the controls say. In the solid view the drawing is the surface of one label map, the
  // prediction's before the reference's; elsewhere it is the reference's outline.
  function layer() {
    const solid = view === "solid", colours = facts.classes.map(one => rgb(one.colour));
    const classes = table(colours, colours.map((_, at) => (hidden.has(at + 1) ? 0 : 255)));
    const filled = on("prediction") ? Number(element("prediction-opacity").value) : 0;
    const outlined = on("reference") ? Number(element("reference-opacity").value) : 0;
    viewer.volumes[PREDICTION].setColormapLabel(classes);
    viewer.volumes[PREDICTION].opacity = solid ? 0 : filled;
    viewer.setDrawColormap(classes);
    draw(solid && filled ? "prediction" : outlined ? "reference" : "", solid);
    viewer.drawRimOpacity = outlined;
    viewer.drawOpacity = solid ? filled || outlined : FAINT;
    if (maps.reference) {
      viewer.volumes[ERRORS].setColormapLabel(table([MISSED, SPURIOUS, OTHER], [255, 255, 255]));
      viewer.volumes[ERRORS].opacity = on("errors") ? 0.85 : 0;
      element("error-key").hidden = !element("errors").checked;
    }
    viewer.updateGLVolume();
    // Of the volume that is rendered; its slices stay as they are, which NiiVue's own opacity would dim with it.
    viewer.renderShader.use(viewer.gl);
    viewer.gl.uniform1f(viewer.renderShader.uniforms.backOpacity, element("image").checked ? VEIL : 0);
  }

  // Let the drawing be a label map without the classes that are hidden, by name; "": nothing. Unless it is that already.
  function draw(name, solid) {
    const wanted = [name, solid, ...hidden].join();
    if (wanted === drawn) return;
    drawn = wanted;
    if (!maps[name]) return viewer.closeDrawing();
    const seen = maps[name].clone();
    seen.img = maps[name].img.map(k => (hidden.has(k) ? 0 : k));
    viewer.opts.smoothDrawing = solid ? 1 : 0;
    viewer.loadDrawing(seen);
  }

  // Views

  const VIEWS = { all: "MULTIPLANAR", axial: "AXIAL", coronal: "CORONAL", sagittal: "SAGITTAL", solid: "RENDER" };

  function turnTo(name) {
    view = name;
    for (const button of element("views").children) button.setAttribute("aria-pressed", button.dataset.view === name);
    viewer.opts.sliceType = niivue.SLICE_TYPE[VIEWS[name]];
    paint();
  }

  function tell(place) {
    const [x, y, z] = place.mm, names = ["none", ...facts.classes.map(one => one.name)];
    const [grey, predicted] = place.values.map(one => one.value);
    const parts = [
      Math.abs(x).toFixed(1) + (x < 0 ? " L" : " R"), Math.abs(y).toFixed(1) + (y < 0 ? " P" : " A"),
      Math.abs(z).toFixed(1) + (z < 0 ? " I" : " S"),
    ];
    let text = parts.join("  ") + " mm \u00b7 intensity " + Number(grey.toPrecision(4));
    if (predicted !== undefined) text += " \u00b7 prediction: " + names[predicted];
    if (maps.reference) text += " \u00b7 reference: " + names[maps.reference.getValue(...place.vox)];
    element("readout").textContent = text;
  }

  // Controls

  function listen() {
    element("cases").addEventListener("click", event => {
      const button = event.target.closest("button");
      if (button && !button.disabled) show(Number(button.dataset.case));
    });
    element("previous").addEventListener("click", () => go(-1));
    element("next").addEventListener("click", () => go(1));
    element("views").addEventListener("click", event => event.target.dataset.view && turnTo(event.target.dataset.view));
    for (const name of ["prediction", "prediction-opacity", "reference", "reference-opacity", "errors", "image"]) {
      if (element(name)) element(name).addEventListener("input", paint);
    }
    element("reset").addEventListener("click", reset);
    for (const button of element("key").querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const index = Number(button.dataset.class), shown = hidden.delete(index);
        if (!shown) hidden.add(index);
        button.setAttribute("aria-pressed", shown);
        paint();
      });
    }
    document.addEventListener("keydown", press, true); // before NiiVue, which has keys of its own
    document.addEventListener("keyup", event => event.code === "Space" && unveil());
    window.addEventListener("blur", unveil);
  }

  function reset() {
    viewer.scene.pan2Dxyzmm = [0, 0, 0, 1];
    viewer.volScaleMultiplier = 1;
    show(current);
  }

  const KEYS = {
    n: () => go(1), p: () => go(-1), 1: () => flip("prediction"), 2: () => flip("reference"), 3: () => flip("errors"),
    m: () => turnTo("all"), a: () => turnTo("axial"), c: () => turnTo("coronal"), s: () => turnTo("sagittal"),
    r: () => turnTo("solid"),
  };

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input[type=search], input[type=text], textarea, select")) return;
    if (event.code === "Space" && event.target === element("canvas")) {
      event.preventDefault();
      if (!bare) { bare = true; paint(); }
    } else if (KEYS[event.key]) {
      event.stopPropagation();
      KEYS[event.key]();
    }
  }

  function unveil() {
    if (bare) { bare = false; paint(); }
  }

  function flip(name) {
    if (!element(name)) return;
    element(name).checked = !element(name).checked;
    paint();
  }

  begin();
})();
