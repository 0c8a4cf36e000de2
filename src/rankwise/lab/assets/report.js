(function () {
  "use strict";
  var root = document.documentElement;
  root.dataset.errors = "0";
  function count() { root.dataset.errors = String(Number(root.dataset.errors) + 1); }
  window.addEventListener("error", count);
  window.addEventListener("unhandledrejection", count);
  document.addEventListener("securitypolicyviolation", count);
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"],
                 toImageButtonOptions: { format: "svg" }, topojsonURL: "" };
  var drawn = Object.keys(figures).map(function (name) {
    return Plotly.newPlot("plot-" + name, figures[name].data, figures[name].layout, config);
  });
  function show(name, choice) {
    var visible = figures[name].data.map(function (trace) { return trace.meta === choice; });
    document.querySelectorAll('button[data-figure="' + name + '"]').forEach(function (button) {
      button.setAttribute("aria-pressed", String(button.dataset.show === choice));
    });
    return Plotly.restyle("plot-" + name, { visible: visible });
  }
  document.querySelectorAll("button[data-figure]").forEach(function (button) {
    var trace = figures[button.dataset.figure].data.find(function (each) { return each.meta === button.dataset.show; });
    button.setAttribute("aria-pressed", String(trace.visible !== false));
    button.addEventListener("click", function () { show(button.dataset.figure, button.dataset.show); });
  });
  Promise.all(drawn).then(function () { root.dataset.drawn = String(drawn.length);
    var asked = performance.getEntriesByType("resource").filter(function (entry) { return !/^(data|blob):/.test(entry.name); });
    root.dataset.requests = String(asked.length);
  });
})();
