"use strict";
// Figures are drawn when they come near the window, so that a page of many opens at once.
(function () {
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var themes = JSON.parse(document.getElementById("themes").textContent);
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var touch = window.matchMedia("(pointer: coarse)").matches;
  var config = {responsive: true, displaylogo: false, showTips: false, displayModeBar: false};
  var drawn = {}, printing = false;

  function draw(id) {
    var node = document.getElementById(id);
    if (!node) return;
    var layout = Object.assign({}, figures[id].layout, {
      template: {layout: dark.matches ? themes.dark : themes.light},
      dragmode: touch ? false : "zoom"  // a finger on a figure scrolls the page
    });
    if (printing) layout.width = node.clientWidth;  // at once; by itself it would be too late
    drawn[id] = true;
    Plotly.react(node, figures[id].data, layout, config);
  }
  function seen(node) { return node.getClientRects().length > 0; }  // not in closed details
  function drawAll() {
    Object.keys(figures).forEach(function (id) {
      var node = document.getElementById(id);
      if (node && seen(node)) draw(id);
    });
  }
  function print(on) {  // a sheet is narrower than most windows
    printing = on;
    document.documentElement.classList.toggle("printing", on);
    drawAll();
    if (!on) Object.keys(drawn).forEach(resize);
  }
  function resize(id) {
    var node = document.getElementById(id);
    if (seen(node)) Plotly.Plots.resize(node);
  }

  var watch = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) {
      if (entry.isIntersecting && !drawn[entry.target.id]) draw(entry.target.id);
    });
  }, {rootMargin: "600px"});
  Object.keys(figures).forEach(function (id) {
    var node = document.getElementById(id);
    if (node) watch.observe(node);
  });
  dark.addEventListener("change", function () { Object.keys(drawn).forEach(draw); });
  // a window that changed while details were closed left their figures at the old width
  document.addEventListener("toggle", function (event) {
    if (!event.target.open) return;
    event.target.querySelectorAll(".plot").forEach(function (node) {
      if (drawn[node.id]) resize(node.id);
    });
  }, true);

  function reveal() {
    var target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (var node = target; node; node = node.parentElement) {
      if (node.tagName === "DETAILS") node.open = true;
    }
    if (target) target.scrollIntoView();
  }
  window.addEventListener("hashchange", reveal);
  document.addEventListener("click", function (event) {  // also where the hash stays the same
    var link = event.target.closest && event.target.closest('a[href^="#"]');
    if (link && link.hash === location.hash) reveal();
  });
  reveal();

  var closed = [];
  window.addEventListener("beforeprint", function () {
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    closed.forEach(function (node) { node.open = true; });
    print(true);
  });
  window.addEventListener("afterprint", function () {
    print(false);
    closed.forEach(function (node) { node.open = false; });
  });

  // Data of a figure as CSV: a row a point, in the units of the axes.
  var views = {f8: Float64Array, f4: Float32Array, i4: Int32Array, i2: Int16Array, i1: Int8Array,
               u4: Uint32Array, u2: Uint16Array, u1: Uint8Array};
  function values(given) {  // plotly's packed arrays and plain ones
    if (given === undefined || given === null) return [];
    if (given.bdata === undefined) return Array.from(given);
    var bytes = Uint8Array.from(atob(given.bdata), function (c) { return c.charCodeAt(0); });
    var flat = Array.from(new views[given.dtype](bytes.buffer));
    var shape = given.shape === undefined ? [] : String(given.shape).split(",").map(Number);
    if (shape.length < 2) return flat;
    var rows = [];
    for (var at = 0; at < flat.length; at += shape[1]) rows.push(flat.slice(at, at + shape[1]));
    return rows;
  }
  function plain(text) {
    var holder = document.createElement("textarea");  // reads entities, makes no elements
    holder.innerHTML = String(text).replace(/<[^>]*>/g, " ");
    return holder.value;
  }
  function axisTitle(layout, name, letter) {
    var axis = layout[(name || letter).replace(/^([xyz])/, "$1axis")];
    return axis && axis.title && axis.title.text ? plain(axis.title.text) : letter;
  }
  // customdata, named by the trace's meta; what the hover text calls a trial is one
  function extra(trace, count) {
    var data = values(trace.customdata);
    if (data.length !== count || !data.length) return [];
    var width = Array.isArray(data[0]) ? data[0].length : 1;
    var names = [];
    for (var i = 0; i < width; i++) {
      var place = width > 1 || Array.isArray(data[0]) ? "%{customdata[" + i + "]" : "%{customdata";
      var isTrial = (trace.hovertemplate || "").indexOf("trial " + place) >= 0;
      var told = Array.isArray(trace.meta) && trace.meta[i];
      names.push({name: told || (isTrial ? "trial" : "detail " + (i + 1)), pick: pickAt(data, i)});
    }
    return names;
  }
  function pickAt(data, i) {
    return function (row) { return Array.isArray(data[row]) ? data[row][i] : data[row]; };
  }
  function table(id) {
    var figure = figures[id], header = ["series"], rows = [];
    function put(cells) {
      var row = [];
      Object.keys(cells).forEach(function (name) {
        if (header.indexOf(name) < 0) header.push(name);
        row[header.indexOf(name)] = cells[name];
      });
      rows.push(row);
    }
    figure.data.forEach(function (trace, index) {
      var series = plain(trace.name || trace.legendgroup || "series " + (index + 1));
      var xName = axisTitle(figure.layout, trace.xaxis, "x");
      var yName = axisTitle(figure.layout, trace.yaxis, "y");
      if (yName === xName) yName += " (y)";
      if (trace.dimensions) {
        var columns = trace.dimensions.map(function (each) { return values(each.values); });
        for (var n = 0; n < columns[0].length; n++) {
          var line = {series: series};
          trace.dimensions.forEach(function (each, k) {
            var place = each.tickvals ? values(each.tickvals).indexOf(columns[k][n]) : -1;
            line[plain(each.label)] = place >= 0 && each.ticktext ? plain(each.ticktext[place]) : columns[k][n];
          });
          put(line);
        }
        return;
      }
      var x = values(trace.x), y = values(trace.y), z = values(trace.z);
      if (z.length && Array.isArray(z[0])) {
        var bar = trace.colorbar && trace.colorbar.title;
        var zName = plain(trace.name || (bar && (bar.text || bar)) || "value");
        z.forEach(function (cells, i) {
          cells.forEach(function (value, j) {
            var cell = {series: series};
            cell[xName] = x.length ? x[j] : j;
            cell[yName] = y.length ? y[i] : i;
            cell[zName === xName || zName === yName ? "value" : zName] = value;
            put(cell);
          });
        });
        return;
      }
      var count = Math.max(x.length, y.length), more = extra(trace, count);
      for (var i = 0; i < count; i++) {
        if (x[i] === null && (y[i] === null || y[i] === undefined)) continue;  // a gap in a line
        var row = {series: series};
        more.forEach(function (each) { row[each.name] = each.pick(i); });
        if (x.length) row[xName] = x[i];
        if (y.length) row[yName] = y[i];
        ["x", "y"].forEach(function (letter) {
          var error = trace["error_" + letter];
          if (!error || !error.array) return;
          var name = letter === "x" ? xName : yName;
          row[name + ", upwards"] = values(error.array)[i];
          row[name + ", downwards"] = values(error.arrayminus || error.array)[i];
        });
        put(row);
      }
    });
    return [header].concat(rows);
  }
  // A spreadsheet takes text that begins like this for a formula; see analysis/spreadsheet.py.
  function inert(cell) {
    return typeof cell === "string" && /^[=+\-@\t\r]/.test(cell) && isNaN(Number(cell)) ? "'" + cell : cell;
  }
  function csv(rows) {
    var width = rows[0].length;
    return rows.map(function (row) {
      var cells = [];
      for (var i = 0; i < width; i++) {
        var text = row[i] === undefined || row[i] === null ? "" : String(inert(row[i]));
        cells.push(/[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text);
      }
      return cells.join(",");
    }).join("\r\n") + "\r\n";
  }
  function save(text, name) {
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
    link.download = name;
    document.body.appendChild(link);
    link.click();
    link.remove();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 10000);
  }
  function nameOf(id) { return document.title.split(" · ")[0] + "-" + id; }
  window.contrasweep = {csv: csv, save: save, nameOf: nameOf, table: table};

  document.addEventListener("click", function (event) {
    var node = event.target;
    if (!node.getAttribute) return;
    var image = node.getAttribute("data-figure"), data = node.getAttribute("data-csv");
    if (image) {
      if (!drawn[image]) draw(image);
      Plotly.downloadImage(document.getElementById(image), {format: "png", scale: 2, filename: nameOf(image)});
    }
    if (data) save(csv(table(data)), nameOf(data) + ".csv");
  });
})();
