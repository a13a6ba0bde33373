(function () {
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var themes = JSON.parse(document.getElementById("themes").textContent);
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var touch = window.matchMedia("(pointer: coarse)").matches;
  var config = {responsive: true, displaylogo: false, showTips: false, displayModeBar: false};
  function draw() {
    Object.keys(figures).forEach(function (id) {
      var node = document.getElementById(id);
      var layout = Object.assign({}, figures[id].layout, {
        template: {layout: dark.matches ? themes.dark : themes.light},
        dragmode: touch ? false : "zoom"  // a finger on a figure scrolls the page
      });
      if (node) Plotly.react(node, figures[id].data, layout, config);
    });
  }
  dark.addEventListener("change", draw);
  document.addEventListener("click", function (event) {
    var id = event.target.getAttribute && event.target.getAttribute("data-figure");
    if (id) Plotly.downloadImage(document.getElementById(id), {format: "png", scale: 2, filename: document.title.split(" · ")[0] + "-" + id});
  });
  draw();
})();
